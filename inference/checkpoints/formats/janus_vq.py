"""The image tokenizer of Janus and Janus-Pro: LlamaGen's VQ-16, trained further by DeepSeek.

transformers searches codes among codebook rows of their own length and decodes rows scaled to
length 1. DeepSeek's code, and so the training, scales both, and finds other codes. The trained way
is the default; `like_transformers` gives transformers' codes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from inference.checkpoints.files.weight_sets import WeightsLayout
from inference.checkpoints.files.weights_file import find_weights, read_weights
from inference.checkpoints.formats.llamagen_vq import LEVELS, llamagen_vqgan
from inference.checkpoints.formats.taming import LEVELS as TAMING_LEVELS
from inference.checkpoints.formats.vqgan_names import (
    LANDMARK,
    VQGANShapes,
    codebook_rules,
    count_levels,
    janus_name,
    quantizer_settings,
    vqgan_part,
)
from inference.checkpoints.options import ConvertOptions
from inference.checkpoints.rules import ConvertedPart
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import UserError

DEFAULT_RESOLUTION = 384  # of Janus and Janus-Pro: 24 x 24 codes of 16 pixels
# prefixes: alone; in transformers' whole Janus (with `model.` before it or not); in DeepSeek's
LAYOUT = WeightsLayout((LANDMARK,), ("", "vqmodel.", "gen_vision_model."))


def convert(source: Path, options: ConvertOptions) -> ConvertedPart:
    """A folder (of the tokenizer alone or of the whole model) or a weights file."""
    options.refuse_unread("janus-vq", "resolution", "like_transformers", "config",
                          "weight_set")
    path = find_weights(source, ("model", "pytorch_model"), "Janus") if source.is_dir() else source
    config_path = options.config or path.parent / "config.json"
    # the config.json beside the weights is optional, one that is given is not
    config = read_mapping(config_path) if options.config or config_path.is_file() else {}
    chosen = read_weights(path, LAYOUT, options.weight_set)
    weights = chosen.tensors
    # DeepSeek kept LlamaGen's names, transformers renamed the tensors to taming's
    by_deepseek = any(name.startswith("encoder.conv_blocks.") for name in weights)
    levels = count_levels(weights, LEVELS if by_deepseek else TAMING_LEVELS, path)

    # a resolution that is given wins: the network takes any, its config states one
    known = options.resolution or _resolution(config, levels, config_path)
    resolution = known or DEFAULT_RESOLUTION
    notes = chosen.notes
    if not known:
        notes += (f"resolution {resolution}: no config.json says it (--resolution)",)

    if by_deepseek:
        if options.like_transformers:  # DeepSeek's own code searches as the model was trained
            raise UserError(f"{path}: has DeepSeek's names; --like-transformers is for a model "
                            "that transformers saved")
        part = llamagen_vqgan(weights, resolution, path)
        return replace(part, notes=(*part.notes, *notes))

    shapes = VQGANShapes(weights, janus_name, levels, path)
    search = {"raw_search": True} if options.like_transformers else {}
    quantizer = quantizer_settings(l2_normalize=True, **search)
    ours = shapes.config(resolution, quantizer, shapes.code_shape())
    return vqgan_part(ours, weights, janus_name, codebook_rules(), path, notes=notes)


def _resolution(config: dict[str, Any], levels: int, path: Path) -> int | None:
    """The resolution by transformers' config, which counts the codes of a side as num_patches."""
    # nested in the config of the whole model, at the top in the tokenizer's own
    vq_config = config.get("vq_config", config)
    patches = vq_config.get("num_patches") if isinstance(vq_config, dict) else None
    if patches is None:
        return None
    if not isinstance(patches, int) or not 0 < patches <= 1024:
        raise UserError(f"{path}: num_patches {patches!r}: expected the codes of a side")
    return patches << (levels - 1)  # every level but the coarsest halves the side
