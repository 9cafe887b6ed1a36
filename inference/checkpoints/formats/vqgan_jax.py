"""VQGAN-jax (https://github.com/patil-suraj/vqgan-jax), DALL-E mini's tokenizer: taming's in Flax.

Flax stores convolutions as [height, width, in, out] and writes `up_4.block_0` for `up.4.block.0`.
DALL-E mini trained it on pixels in [0, 1].
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
from inference.checkpoints.options import ConvertOptions, agreed_resolution
from inference.checkpoints.rules import ConvertedPart
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import MissingFileError, UserError

FLAX_WEIGHTS_NAME = "flax_model.msgpack"
_NUMBERED = re.compile(r"\b(down|up|block|attn)_(\d+)\.")
_MID = re.compile(r"\bmid\.(block|attn)_")  # mid.block_1: taming writes these with _ too
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def convert(source: Path, options: ConvertOptions) -> ConvertedPart:
    """A folder with flax_model.msgpack and config.json, or the former alone."""
    options.refuse_unread("vqgan-jax", "config", "resolution")
    path = flax_weights(source)
    settings = options.config or path.with_name("config.json")
    in_config = None
    if options.config or settings.is_file():
        in_config = read_mapping(settings).get("resolution")

    resolution = agreed_resolution(in_config, options.resolution, settings)
    notes: tuple[str, ...] = ()
    if resolution is None:
        notes = (f"resolution {DEFAULT_RESOLUTION}: without its config.json the "
                 "file does not say it",)
    weights = taming_tensors(read_msgpack(path), path)
    part = taming_vqgan(weights, resolution or DEFAULT_RESOLUTION, path, notes)
    # not stated by any file, and taming_vqgan takes [-1, 1]
    config = part.config.model_copy(update={"input_range": "unit", "output_range": "unit"})
    return replace(part, config=config)


def flax_weights(source: Path) -> Path:
    """The weights file in a folder, or the file itself."""
    path = source / FLAX_WEIGHTS_NAME if source.is_dir() else source
    if not path.is_file() or path.suffix != ".msgpack":
        raise MissingFileError(f"{source}: no {FLAX_WEIGHTS_NAME} in it, so it is not a folder of "
                               "Flax weights")
    return path


def taming_tensors(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Views under taming's names in torch's axis order. UserError if two tensors get one name."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.removeprefix("params.").rpartition(".")
        if not _MID.search(f"{module}."):  # the dot ends the last part, which may be numbered too
            module = _NUMBERED.sub(r"\1.\2.", f"{module}.").removesuffix(".")
        if leaf == "kernel" and tensor.ndim == 4:  # attention too has 1x1 convolutions
            # [height, width, in, out] -> [out, in, height, width]
            tensor = tensor.permute(3, 2, 0, 1)

        new_name = f"{module}.{_LEAVES.get(leaf, leaf)}"
        if new_name in renamed:
            raise UserError(f"{where}: holds {new_name} under two names")
        renamed[new_name] = tensor
    return renamed
