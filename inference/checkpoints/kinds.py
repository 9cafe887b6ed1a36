"""The kinds of published checkpoints by name, which one a file is, and converting it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from inference.checkpoints.converted import ConvertedModel
from inference.checkpoints.rules import ConvertedPart
from tokenloom_common.errors import MissingFileError, UserError, choose
from tokenloom_common.pretrained import PretrainedModule

KINDS: dict[str, str] = {
    "taming": "VQGAN of taming-transformers or latent diffusion (.ckpt or .safetensors, with its yaml), GumbelVQ too",
    "llamagen-vq": "LlamaGen's VQ-16 and VQ-8 (.pt)",
    "llamagen-gpt": "LlamaGen's transformers, of classes or of text (.pt)",
    "diffusers-vq": "a VQModel folder of diffusers (aMUSEd's too)",
    "min-dalle": "min-dalle's encoder.pt, decoder.pt, detoker.pt, vocab.json and merges.txt",
    "dalle-mini": "DALL-E mini or mega: flax_model.msgpack with its config.json and tokenizer",
    "vqgan-jax": "DALL-E mini's image tokenizer: flax_model.msgpack with its config.json",
    "janus-vq": "the image tokenizer of Janus, as transformers or DeepSeek saves it",
}
"""Kind -> what it is. Its converter is `convert` in the module of that name (with _ for -), imported when it is used."""

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


def convert(kind: str | None, source: str | Path, options: ConvertOptions = ConvertOptions()) -> ConvertedPart | ConvertedModel:
    """What a published checkpoint becomes, checked and not yet written. kind: a name in KINDS; None = by what is in it."""
    path = Path(source)
    if not str(source) or not path.exists():
        raise MissingFileError(f"{source!s}: no such file or folder" if str(source) else "the source is an empty name")
    if kind is not None:
        choose(KINDS, kind, "kind of checkpoint")
    options.check()
    if kind is None:
        from inference.checkpoints.detect import detect

        kind = detect(path)
    converted = importlib.import_module(f"inference.checkpoints.{kind.replace('-', '_')}").convert(path, options)
    converted.check()
    return converted


def from_checkpoint(kind: str | None, source: str | Path, config: str | Path | None = None, *, resolution: int | None = None,
                    image_tokenizer: str | Path | None = None, text_encoder: str | None = None,
                    classes: str | Path | None = None, like_transformers: bool = False) -> PretrainedModule | object:
    """A published checkpoint as a model in memory: an image tokenizer, a transformer, or a TextToImage that samples.

    kind: a name in `inference.checkpoints.KINDS`, None = by what is in it. config and the rest: see ConvertOptions.
    UserError in one line for a file of another kind, missing, unexpected or mis-shaped tensors, a file that asks for code.
    """
    def path(value: str | Path | None) -> Path | None:
        return None if value is None else Path(value)

    options = ConvertOptions(path(config), resolution, path(image_tokenizer), text_encoder, path(classes), like_transformers)
    return convert(kind, source, options).load()
