"""LlamaGen's VQ-16 and VQ-8 (https://arxiv.org/abs/2406.06525): VQGANs with l2-normalised codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from inference.checkpoints.files.weight_sets import WeightsLayout
from inference.checkpoints.files.weights_file import find_weights, read_weights
from inference.checkpoints.formats.vqgan_names import (
    DEFAULT_RESOLUTION,
    LANDMARK,
    VQGANShapes,
    codebook_rules,
    count_levels,
    llamagen_name,
    quantizer_settings,
    vqgan_part,
)
from inference.checkpoints.options import ConvertOptions
from inference.checkpoints.rules import ConvertedPart

# the order in which LlamaGen's own scripts look, after `ema`
LAYOUT = WeightsLayout((LANDMARK,), containers=("model", "state_dict"))
LEVELS = r"encoder\.conv_blocks\.(\d+)\."
IGNORED = ("quantize.codebook_used",)  # a statistic of the training


def convert(source: Path, options: ConvertOptions) -> ConvertedPart:
    """A `.pt` file, or the folder of its Hub wrapper."""
    options.refuse_unread("llamagen-vq", "resolution", "weight_set")
    if source.is_dir():
        source = find_weights(source, ("model", "pytorch_model"), "LlamaGen's VQ model")
    weights = read_weights(source, LAYOUT, options.weight_set)
    part = llamagen_vqgan(weights.tensors, options.resolution, source)
    return replace(part, notes=(*weights.notes, *part.notes))


def llamagen_vqgan(weights: Mapping[str, Tensor], resolution: int | None, where: Path
                   ) -> ConvertedPart:
    """A VQGAN under LlamaGen's names, whose files do not state the resolution."""
    notes: tuple[str, ...] = ()
    if resolution is None:
        resolution = DEFAULT_RESOLUTION
        notes = (f"resolution {resolution}: the file does not say it (--resolution)",)
    shapes = VQGANShapes(weights, llamagen_name, count_levels(weights, LEVELS, where), where)
    # LlamaGen scales vectors and codes to length 1 for the search and for the decoder
    quantizer = quantizer_settings(l2_normalize=True)
    config = shapes.config(resolution, quantizer, shapes.code_shape())
    return vqgan_part(config, weights, llamagen_name, codebook_rules(), where, IGNORED, notes)
