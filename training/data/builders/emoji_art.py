"""Art of one emoji style: which emoji it draws, and each of them as RGB pixels over white."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from training.data.builders.emoji_names import Emoji, plain_code

Art = str | Path  # SVG text, or the path of an image or SVG file

_SVG = ('<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        'viewBox="{}">{}</svg>')
_MAX_ALIASES = 5


def read_iconify(folder: Path, emojis: list[Emoji]) -> dict[str, Art]:
    """Read SVG text by emoji code from an Iconify package.

    Emoji are found in its chars.json, or matched by name if that is empty.
    """
    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    chars_path = folder / "chars.json"
    chars = {}
    if chars_path.is_file():
        chars = json.loads(chars_path.read_text(encoding="utf-8"))

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
    """Match icon names to emoji codes by the emoji's label or, failing that, another of its names.

    Only letters and digits are compared. A name that fits two emoji fits none: a wrong caption is
    worse than a gap.
    """
    name_of = {_letters(name): name for name in reversed(names)}  # of equal ones the first stays
    matched: dict[str, str] = {}
    # all labels first: another name of one emoji may be the label of the next
    _match(emojis, [[emoji.label] for emoji in emojis], name_of, matched)
    _match(emojis, [list(emoji.other_names) for emoji in emojis], name_of, matched)
    return matched


def _match(emojis: list[Emoji], names: list[list[str]], name_of: Mapping[str, str],
           matched: dict[str, str]) -> None:
    """Add to `matched` the emoji that one of their `names` identifies, unless matched already."""
    taken = set(matched.values())
    spellings = [list(map(_letters, names_of_one)) for names_of_one in names]
    claims = Counter(spelling for of_one in spellings for spelling in set(of_one))

    for emoji, of_one in zip(emojis, spellings, strict=True):
        for spelling in of_one:
            name = name_of.get(spelling)
            is_certain = claims[spelling] == 1 and name not in taken
            if name and is_certain and emoji.code not in matched:
                matched[emoji.code] = name


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _svg(icons: Mapping, name: str) -> str | None:
    """SVG text of an icon or alias; None if it is unknown, hidden or rotated."""
    aliases = icons.get("aliases", {})
    icon = icons["icons"].get(name)
    flips: Counter = Counter()
    quarter_turns = 0
    for _ in range(_MAX_ALIASES):  # an alias may lead to an alias, even to itself
        if icon is not None:
            break
        alias = aliases.get(name)
        if alias is None:
            return None
        flips += Counter(axis for axis in ("hFlip", "vFlip") if alias.get(axis))
        quarter_turns += alias.get("rotate", 0)
        name = alias["parent"]
        icon = icons["icons"].get(name)

    # no emoji set rotates its icons; flips are used for arrows
    if icon is None or icon.get("hidden") or quarter_turns % 4:
        return None

    # an icon inherits the box of its set; 0, 0, 16, 16 are Iconify's defaults
    left = icon.get("left", icons.get("left", 0))
    top = icon.get("top", icons.get("top", 0))
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    body = icon["body"]
    # mirrored about the middle of the box
    if flips["hFlip"] % 2:
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    if flips["vFlip"] % 2:
        body = f'<g transform="translate(0 {2 * top + height}) scale(1 -1)">{body}</g>'
    return _SVG.format(f"{left} {top} {width} {height}", body)


def read_named_files(folder: Path, suffix: str) -> dict[str, Art]:
    """Find the files named by code points ('1f469-200d-1f33e.webp'): paths by emoji code."""
    return {plain_code(path.stem): path for path in sorted(folder.glob(f"*{suffix}"))}


def render(art: Art, size: int) -> np.ndarray:
    """Draw one emoji -> uint8 [size, size, 3] over white, whole, centred.

    ValueError or OSError if it cannot be drawn.
    """
    if isinstance(art, str):
        image = _rasterise(art, size)
    elif art.suffix == ".svg":
        image = _rasterise(art.read_text(encoding="utf-8"), size)
    else:
        image = Image.open(art, formats=["PNG", "WEBP"]).convert("RGBA")

    white = Image.new("RGBA", image.size, "white")
    # before resizing, so that edges blend with white
    image = Image.alpha_composite(white, image).convert("RGB")
    # thumbnail never enlarges: a small image stays sharp, with a margin
    image.thumbnail((size, size), Image.Resampling.LANCZOS, reducing_gap=None)

    square = Image.new("RGB", (size, size), "white")
    square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return np.asarray(square)


def _rasterise(svg: str, size: int) -> Image.Image:
    import resvg_py

    # drawn at twice the size and reduced: thin lines keep their weight
    # dpi 0, the default, fails on sizes in pt or mm; no font is ever needed
    png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * size, dpi=96.0, skip_system_fonts=True)
    return Image.open(BytesIO(png)).convert("RGBA")


def render_png(job: tuple[Art, int]) -> tuple[bytes, bytes] | str:
    """Draw (art, size) -> (PNG bytes, raw pixel bytes), or the reason why not.

    One argument, and errors as text, for `Pool.imap`.
    """
    art, size = job
    try:
        pixels = render(art, size)
    except (ValueError, OSError) as error:
        # the type first, which `draw_rows` counts by: `one_line` may begin with the file's name
        detail = " ".join(str(error).split())
        return f"{type(error).__name__}: {detail[:200]}"
    if pixels.min() == 255:  # all white: an empty icon, or made of what resvg leaves out
        return "blank picture"

    out = BytesIO()
    Image.fromarray(pixels).save(out, "PNG", optimize=True)
    return out.getvalue(), pixels.tobytes()
