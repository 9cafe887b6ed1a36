"""Advice about a folder without usable data: what it holds, and the nearest way on."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from tokenloom_common.errors import UserError
from training.data.sources.collector import DOWNLOAD_FIRST, lists_urls, shown_names
from training.data.sources.folders.metadata import ImageList
from training.data.sources.folders.sidecars import RECORD_ENDING, caption_endings
from training.data.sources.options import EXPECTED, ReadOptions
from training.data.sources.tree import IMAGE_SUFFIXES, UNREAD_IMAGES, FileTree

SHOWN_ENDINGS = 5
SHOWN_LISTS = 3
HEAD_BYTES = 1 << 16
ARCHIVES = (".zip", ".rar", ".7z", ".zst")


def advice_for(tree: FileTree, options: ReadOptions) -> str:
    """Format as ': 8 .jpg and 8 .xml files; ...', with what may be done about it."""
    endings = tree.endings().most_common(SHOWN_ENDINGS)
    there = ", ".join(f"{count:,} {ending}" for ending, count in endings) or "no files"
    return "; ".join([f" ({there})", *_ways_on(tree, options)])


def _ways_on(tree: FileTree, options: ReadOptions) -> list[str]:
    ways = []
    if tree.links:
        ways.append(f"{tree.relative(tree.links[0])} is a link to a folder elsewhere, which "
                    "--data.follow_links true follows")
    kind = _import_kind(tree)
    if kind is not None:
        ways.append(f"bring it with `tokenloom data import {kind} {tree.root} --out DIR`")
    archives = [path for path in tree.others if path.suffix.lower() in ARCHIVES]
    if archives:
        ways.append(f"unpack {archives[0].name} first")
    ways += _lists(tree, options)
    if tree.images and kind is None:
        ways += _captions(tree, options)
    unread = [path for path in tree.others if path.suffix.lower() in UNREAD_IMAGES]
    if unread and not tree.images:
        ways.append(f"{unread[0].suffix} files are not read: convert them to PNG or JPEG")
    return ways


def _import_kind(tree: FileTree) -> str | None:
    """Return the kind of `tokenloom data import` that a folder looks like."""
    for path in [*tree.others, *tree.lists, *tree.parquet]:
        name = path.name.lower()
        if (name.startswith("captions_") and name.endswith(".json")) or name == "dataset_coco.json":
            return "coco"
        if name == "results.csv" or name.endswith(".token"):
            return "flickr30k"
        if name == "captions.txt":
            return "flickr8k"
        if name.endswith(".json") and name.startswith("part-"):
            return "diffusiondb"
    return None


def _lists(tree: FileTree, options: ReadOptions) -> list[str]:
    ways = []
    for path in [*tree.lists, *tree.parquet][:SHOWN_LISTS]:
        columns = ImageList(path, tree, options).columns
        if lists_urls(columns):
            ways.append(f"{tree.relative(path)} {DOWNLOAD_FIRST}")
        elif not tree.images:
            ways.append(f"{tree.relative(path)} may list images, but no file here ends as they do: "
                        f"{' '.join(IMAGE_SUFFIXES)}")
        else:
            ways.append(f"{tree.relative(path)} has the columns {shown_names(columns) or 'none'}: "
                        "name those of image and caption with --data.image_column and "
                        "--data.caption_column")
    return ways


def _captions(tree: FileTree, options: ReadOptions) -> list[str]:
    """Say where captions may be: in files of another ending, or in the names of folders."""
    ways = []
    stems = {image.with_suffix("") for image in tree.images}
    known = (*caption_endings(options), RECORD_ENDING)
    beside = [path.suffix for path in tree.others
              if path.with_suffix("") in stems and path.suffix.lower() not in known]
    if beside:
        ways.append(f"if the {beside[0]} files beside them hold captions, give "
                    f"--data.caption_ending {beside[0]}")
    folders = {image.parent.name for image in tree.images if image.parent != tree.root}
    if len(folders) > 1:
        some = " and ".join(sorted(folders)[:2])
        ways.append(f"if the folders ({some}, {len(folders):,} in all) are classes, give "
                    "--data.format classes")
    return ways


def is_document(path: Path) -> bool:
    """Whether a .json file holds images and captions in tables of their own, as COCO's do."""
    if path.suffix.lower() != ".json":
        return False
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    return any(table in head for table in (b'"images"', b'"annotations"', b'"licenses"'))


def refuse_file(path: Path, text: str) -> NoReturn:
    """Raise UserError for a file that is no data set."""
    kind = path.suffix.lower() or "nameless"
    if kind == ".json":
        raise UserError(f"{text}: one document about all images, as COCO's captions are; bring it "
                        "with `tokenloom data import coco SRC --out DIR`")
    if kind in ARCHIVES:
        raise UserError(f"{text}: unpack the archive, and give the folder")
    raise UserError(f"{text}: a {kind} file is not a data set; expected {EXPECTED}")
