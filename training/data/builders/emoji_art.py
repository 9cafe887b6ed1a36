"""The pictures of one emoji style: which emoji it draws, and each of them as RGB pixels over white."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from tokenloom_common.errors import one_line
from training.data.builders.emoji_names import Emoji, plain_code

Art = str | Path  # SVG text, or the path of a ready picture
_SVG_HEAD = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{}">{}</svg>'
_MAX_ALIASES = 5


def read_iconify(folder: Path, emojis: list[Emoji]) -> dict[str, Art]:
    """SVG text by emoji code from an Iconify package: by its chars.json, or by name where that is empty."""
    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    chars_path = folder / "chars.json"
    chars = json.loads(chars_path.read_text(encoding="utf-8")) if chars_path.is_file() else {}
    name_of = {plain_code(code): name for code, name in chars.items()}
    if not name_of:  # some packages ship the file empty
        name_of = match_names(emojis, [*icons["icons"], *icons.get("aliases", {})])
    art: dict[str, Art] = {}
    for code, name in name_of.items():
        svg = _svg(icons, name)
        if svg:
            art[code] = svg
    return art


def match_names(emojis: list[Emoji], names: list[str]) -> dict[str, str]:
    """Icon name by emoji code where an emoji's label (or, failing that, another name of its own) equals the icon's.

    Letters and digits are compared only. A name that fits two emoji fits none: a wrong caption is worse than a gap.
    """
    plain_names = {_letters(name): name for name in reversed(names)}
    matched: dict[str, str] = {}
    for spellings in ([(e.label,) for e in emojis], [e.other_names for e in emojis]):
        taken = set(matched.values())
        claims = Counter(spelling for names_of_one in spellings for spelling in {_letters(n) for n in names_of_one})
        for emoji, names_of_one in zip(emojis, spellings, strict=True):
            for spelling in map(_letters, names_of_one):
                name = plain_names.get(spelling)
                if name and claims[spelling] == 1 and emoji.code not in matched and name not in taken:
                    matched[emoji.code] = name
    return matched


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _svg(icons: Mapping, name: str) -> str | None:
    icon, flips, turns = icons["icons"].get(name), [], 0
    for _ in range(_MAX_ALIASES):
        if icon is not None:
            break
        alias = icons.get("aliases", {}).get(name)
        if alias is None:
            return None
        flips += [axis for axis in ("hFlip", "vFlip") if alias.get(axis)]
        turns += alias.get("rotate", 0)
        name = alias["parent"]
        icon = icons["icons"].get(name)
    if icon is None or icon.get("hidden") or turns % 4:  # no emoji set turns its icons; flips are used for arrows
        return None
    left, top = icon.get("left", icons.get("left", 0)), icon.get("top", icons.get("top", 0))
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    body = icon["body"]
    if flips.count("hFlip") % 2:
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    if flips.count("vFlip") % 2:
        body = f'<g transform="translate(0 {2 * top + height}) scale(1 -1)">{body}</g>'
    return _SVG_HEAD.format(f"{left} {top} {width} {height}", body)


def read_named_files(folder: Path, suffix: str) -> dict[str, Art]:
    """Picture paths by emoji code, from files that are named by code points ('1f469-200d-1f33e.webp')."""
    return {plain_code(path.stem): path for path in sorted(folder.glob(f"*{suffix}"))}


def render(art: Art, size: int) -> np.ndarray:
    """One picture -> uint8 [size, size, 3] over white, whole, centred. ValueError or OSError if it cannot be drawn."""
    if isinstance(art, Path) and art.suffix != ".svg":
        image = Image.open(art, formats=["PNG", "WEBP"]).convert("RGBA")
    else:
        image = _rasterise(art.read_text(encoding="utf-8") if isinstance(art, Path) else art, size)
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB")  # before resizing, so that edges blend with white
    image.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=None)
    square = Image.new("RGB", (size, size), "white")
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return np.asarray(square)


def _rasterise(svg: str, size: int) -> Image.Image:
    import resvg_py

    wide = 2 * size  # drawn at twice the size and reduced: thin lines keep their weight
    # dpi 0, the default, fails on sizes in pt or mm; no font is ever needed
    return Image.open(BytesIO(resvg_py.svg_to_bytes(svg_string=svg, width=wide, dpi=96.0, skip_system_fonts=True))
                      ).convert("RGBA")


def render_png(job: tuple[Art, int]) -> tuple[bytes, bytes] | str:
    """(art, size) -> (PNG bytes, raw pixel bytes), or the reason as text; made for worker processes."""
    art, size = job
    try:
        pixels = render(art, size)
    except (ValueError, OSError) as error:
        return one_line(error)[:200]
    if pixels.min() == 255:
        return "blank picture"
    out = BytesIO()
    Image.fromarray(pixels).save(out, "PNG", optimize=True)
    return out.getvalue(), pixels.tobytes()
