"""The kinds of published checkpoints by name, which one a file is, and converting it."""

from __future__ import annotations

import importlib
from pathlib import Path

from inference.checkpoints.converted import ConvertedModel
from inference.checkpoints.options import ConvertOptions
from inference.checkpoints.rules import ConvertedPart
from tokenloom_common.errors import MissingFileError, choose
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
    converted = importlib.import_module(f"inference.checkpoints.formats.{kind.replace('-', '_')}").convert(path, options)
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
