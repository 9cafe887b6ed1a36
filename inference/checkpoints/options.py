"""Options of a checkpoint conversion."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenloom_common.errors import MissingFileError, UserError

MAX_RESOLUTION = 1 << 14


@dataclass(frozen=True)
class ConvertOptions:
    """What a source does not say itself. A kind refuses what it does not read."""

    config: Path | None = None
    """taming: its yaml. llamagen-gpt: n_head, where the size is not a published one. min-dalle: attention_head_count, where
    heads are not 64 wide. Others: their own config, elsewhere."""
    resolution: int | None = None
    """Pixels of a side, where the source does not say."""
    image_tokenizer: Path | None = None
    """Folder of the image tokenizer (converted before) of a transformer that comes without."""
    text_encoder: str | None = None
    """Folder or hub id of the frozen text encoder that a transformer reads."""
    classes: Path | None = None
    """A file with the names of a transformer's classes, one a line."""
    like_transformers: bool = False
    """janus-vq: search codes as transformers' code does, not as the model was trained."""

    def check(self) -> None:
        """UserError for a resolution that no picture has, and for a file or folder that is not there."""
        if self.resolution is not None and not (type(self.resolution) is int and 1 <= self.resolution <= MAX_RESOLUTION):
            raise UserError(f"--resolution {self.resolution}: expected pixels of a side, 1 to {MAX_RESOLUTION:,}")
        for flag, path in (("--config", self.config), ("--classes", self.classes)):
            if path is not None and not path.is_file():
                raise MissingFileError(f"{flag} {path}: {'is a folder; give the file' if path.is_dir() else 'no such file'}")
        if self.image_tokenizer is not None and not self.image_tokenizer.exists():
            raise MissingFileError(f"--image-tokenizer {self.image_tokenizer}: no such folder")

    def only(self, kind: str, *read: str) -> ConvertOptions:
        """Itself; UserError when an option is given that this kind does not read."""
        given = [name for name, field in self.__dataclass_fields__.items() if getattr(self, name) != field.default]
        unread = [name for name in given if name not in read]
        if unread:
            flag = "--" + unread[0].replace("_", "-")
            raise UserError(f"{flag} is not read when converting {kind}" + (
                f" (it reads {', '.join('--' + name.replace('_', '-') for name in read)})" if read else "") + "; leave it out")
        return self
