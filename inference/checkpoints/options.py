"""Options of a checkpoint conversion."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenloom_common.errors import MissingFileError, UserError

MAX_RESOLUTION = 1 << 14


@dataclass(frozen=True)
class ConvertOptions:
    """Facts that a source does not state itself. A kind refuses options that it does not read."""

    config: Path | None = None
    """taming: its yaml. llamagen-gpt: n_head, for an unpublished size. min-dalle:
    attention_head_count, for heads that are not 64 wide. Others: their config, if elsewhere."""
    resolution: int | None = None
    """Image side in pixels."""
    image_tokenizer: Path | None = None
    """Folder of the (converted) image tokenizer, for a transformer that comes without one."""
    text_encoder: str | None = None
    """Folder or hub id of the frozen text encoder that a transformer reads."""
    classes: Path | None = None
    """File with the names of a transformer's classes, one per line."""
    weight_set: str | None = None
    """Of a file with several sets of weights: `ema` for the average, `raw` for the weights of the
    last step, or a set's own name in the file. None: what the project's own sampler takes."""
    like_transformers: bool = False
    """janus-vq: search codes as transformers' code does, not as the model was trained."""

    def check(self) -> None:
        """UserError for an impossible resolution, and for a file or folder that is not there."""
        if self.resolution is not None:
            _check_resolution(self.resolution)

        for flag, path in (("--config", self.config), ("--classes", self.classes)):
            if path is not None and not path.is_file():
                reason = "is a folder; give the file" if path.is_dir() else "no such file"
                raise MissingFileError(f"{flag} {path}: {reason}")

        # text_encoder may be a hub id, so it is looked up when it is loaded
        if self.image_tokenizer is not None and not self.image_tokenizer.exists():
            raise MissingFileError(f"--image-tokenizer {self.image_tokenizer}: no such folder")

    def refuse_unread(self, kind: str, *read: str) -> None:
        """UserError if another option is given than those that the converter of `kind` reads."""
        # an option without effect would look as if it had been applied
        for name, field in self.__dataclass_fields__.items():
            if name not in read and getattr(self, name) != field.default:
                choices = f" (it reads {', '.join(map(_flag, read))})" if read else ""
                raise UserError(f"{_flag(name)} is not read when converting {kind}{choices}; leave "
                                "it out")


def _check_resolution(resolution: int) -> None:
    # from_checkpoint passes on what Python callers give, so a bool or a float can come here
    if type(resolution) is not int or not 1 <= resolution <= MAX_RESOLUTION:
        raise UserError(f"--resolution {resolution}: expected pixels of a side, 1 to "
                        f"{MAX_RESOLUTION:,}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def agreed_resolution(in_config: object, given: int | None, config_path: Path | None) -> int | None:
    """The resolution by the source's config (`in_config`) or --resolution (`given`), if any.

    UserError for a value that is no resolution, and where the two differ.
    """
    if in_config is None:
        return given
    if type(in_config) is not int or not 1 <= in_config <= MAX_RESOLUTION:
        raise UserError(f"{config_path}: resolution {in_config!r}: expected pixels of a side")
    if given is not None and given != in_config:
        raise UserError(f"--resolution {given}: {config_path} says {in_config}; "
                        "leave --resolution out")
    return in_config
