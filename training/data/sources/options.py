"""How a data set is to be read: the choices of a config or a command line."""

from __future__ import annotations

from dataclasses import dataclass

from tokenloom_common.errors import UserError, choose

FORMATS = {
    "metadata": "a metadata file that lists images and captions",
    "sidecar": "images with caption files beside them",
    "classes": "images in folders, whose names are the captions",
    "parquet": "parquet files",
    "tar": "webdataset tar shards",
    "saved": "a folder of datasets' save_to_disk",
}
"""Formats of local data; each has a reader in open_dataset.py."""

EXPECTED = ("images with .txt files or in a metadata.jsonl, parquet files, webdataset .tar shards "
            "(a file, a folder, {000..012}.tar), a save_to_disk folder, or a hub id owner/name")


@dataclass(frozen=True)
class ReadOptions:
    """Choices that every reader gets; the defaults find out by looking."""

    format: str | None = None
    """One of FORMATS, for a folder that holds several kinds, or whose folder names are classes."""
    caption_column: str | None = None
    image_column: str | None = None
    caption_ending: str | None = None
    """Ending of the caption files beside images or in tars, such as .tags."""
    encoding: str | None = None
    """Python's name of the encoding of captions without a byte order mark; None is UTF-8."""
    follow_links: bool = False
    """Follow links that lead out of the folder."""
    max_pixels: int | None = None
    """Width x height of the largest image; None is that of `open_image`."""
    streamed_rows: int = 0
    """Read parquet and tar shards in place, with so many rows in memory; 0 is through a cache."""

    def check(self) -> None:
        """Raise UserError for a format, an encoding or an ending that cannot be."""
        if self.format is not None:
            choose(FORMATS, self.format, "data.format")
        if self.encoding is not None:
            try:
                b"a".decode(self.encoding, "replace")  # also refuses codecs that give no text
            except (LookupError, ValueError):  # ValueError: of codecs for other things than texts
                raise UserError(f"data.encoding {self.encoding}: no such encoding; give Python's "
                                "name of one, such as cp1252, latin-1 or gb18030") from None
        ending = self.caption_ending
        if ending is not None and ending.strip(". ") == "":
            raise UserError("data.caption_ending is empty; give an ending such as .tags")
