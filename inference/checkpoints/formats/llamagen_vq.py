"""LlamaGen's VQ-16 and VQ-8 (Sun et al. 2024, https://arxiv.org/abs/2406.06525): a taming VQGAN with l2-normalised codes."""

from __future__ import annotations

from pathlib import Path

from inference.checkpoints.files.weights_file import find_weights, read_weights
from inference.checkpoints.formats.vqgan_names import (
    CODEBOOK,
    DEFAULT_RESOLUTION,
    Inferred,
    codebook_rules,
    count_levels,
    llamagen_name,
    quantizer_settings,
    vqgan_part,
)
from inference.checkpoints.options import ConvertOptions
from inference.checkpoints.rules import ConvertedPart

CONTAINERS = ("ema", "model", "state_dict")  # the order in which LlamaGen's own scripts look
LEVELS = r"encoder\.conv_blocks\.(\d+)\."


def convert(source: Path, options: ConvertOptions) -> ConvertedPart:
    """A `.pt` file, or the folder of its Hub wrapper."""
    options.only("llamagen-vq", "resolution")
    path = find_weights(source, ("model", "pytorch_model"), "LlamaGen's VQ model") if source.is_dir() else source
    return llamagen_vqgan(read_weights(path, CONTAINERS), options.resolution, path)


def llamagen_vqgan(weights: dict, resolution: int | None, where: Path) -> ConvertedPart:
    """A VQGAN under LlamaGen's names. Its files do not say the resolution: 256 px unless told."""
    levels = count_levels(weights, LEVELS, where)
    found = Inferred(weights, llamagen_name, levels, where)
    notes = () if resolution else (f"resolution {DEFAULT_RESOLUTION}: the file does not say it (--resolution)",)
    config = found.config(resolution or DEFAULT_RESOLUTION, quantizer_settings(l2_normalize=True), found.shape(CODEBOOK)[:2])
    return vqgan_part(config, weights, llamagen_name, codebook_rules(), where, ("quantize.codebook_used",), notes)
