"""VQGAN-jax's folders (https://github.com/patil-suraj/vqgan-jax), DALL-E mini's image tokenizer: taming's VQGAN in Flax.

Flax keeps convolutions as [height, width, in, out], writes `up_4.block_0` for `up.4.block.0`, and DALL-E mini trained it on
pixels in [0, 1].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from inference.checkpoints.files.msgpack_file import read_msgpack
from inference.checkpoints.formats.taming import taming_vqgan
from inference.checkpoints.formats.vqgan_names import DEFAULT_RESOLUTION
from inference.checkpoints.options import ConvertOptions
from inference.checkpoints.rules import ConvertedPart
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import MissingFileError, UserError

WEIGHTS_NAME = "flax_model.msgpack"
_NUMBERED = re.compile(r"\b(down|up|block|attn)_(\d+)\.")
_NOT_IN_MID = re.compile(r"\bmid\.(block|attn)_")
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def convert(source: Path, options: ConvertOptions) -> ConvertedPart:
    """A folder with flax_model.msgpack and config.json, or the former alone."""
    options.only("vqgan-jax", "config", "resolution")
    path = flax_weights(source)
    settings = options.config or path.with_name("config.json")
    said = read_mapping(settings).get("resolution") if options.config or settings.is_file() else None
    if said is not None and not (type(said) is int and 0 < said <= 1 << 14):
        raise UserError(f"{settings}: resolution {said!r}: expected pixels of a side")
    if said and options.resolution and said != options.resolution:
        raise UserError(f"--resolution {options.resolution}: {settings} says {said}; leave --resolution out")
    resolution = said or options.resolution
    notes = () if resolution else (f"resolution {DEFAULT_RESOLUTION}: without its config.json the file does not say it",)
    part = taming_vqgan(taming_tensors(read_msgpack(path), path), resolution or DEFAULT_RESOLUTION, path, notes)
    return replace(part, config=part.config.model_copy(update={"input_range": "unit", "output_range": "unit"}))


def flax_weights(source: Path) -> Path:
    """The weights file of a folder, or the file itself."""
    path = source / WEIGHTS_NAME if source.is_dir() else source
    if not path.is_file() or path.suffix != ".msgpack":
        raise MissingFileError(f"{source}: no {WEIGHTS_NAME} in it, so it is not a folder of Flax weights")
    return path


def taming_tensors(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Under taming's names, as torch lays them out; views. UserError where two would get one name."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place, _, leaf = name.removeprefix("params.").rpartition(".")
        if not _NOT_IN_MID.search(f"{place}."):
            place = _NUMBERED.sub(r"\1.\2.", f"{place}.").removesuffix(".")
        if leaf == "kernel" and tensor.ndim == 4:
            tensor = tensor.permute(3, 2, 0, 1)
        plain = f"{place}.{_LEAVES.get(leaf, leaf)}"
        if plain in found:
            raise UserError(f"{where}: holds {plain} under two names")
        found[plain] = tensor
    return found
