"""The image tokenizer of Janus and Janus-Pro (LlamaGen's VQ-16, trained on by DeepSeek), as transformers or DeepSeek saves it.

transformers searches codes among rows of the codebook at their own length and decodes rows scaled to length 1; DeepSeek's
code, and so the training, scales both. The codes differ. The default is the trained way; `like_transformers` gives those of the
other.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from inference.checkpoints.files.weights_file import below, find_weights, read_weights
from inference.checkpoints.formats.llamagen_vq import LEVELS, llamagen_vqgan
from inference.checkpoints.formats.taming import LEVELS as TAMING_LEVELS
from inference.checkpoints.formats.vqgan_names import (
    CODEBOOK,
    Inferred,
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

DEFAULT_RESOLUTION = 384
PREFIXES = ("", "model.vqmodel.", "vqmodel.", "gen_vision_model.")


def convert(source: Path, options: ConvertOptions) -> ConvertedPart:
    """A folder (of the tokenizer alone or of the whole model) or a weights file."""
    options.only("janus-vq", "resolution", "like_transformers", "config")
    path = find_weights(source, ("model", "pytorch_model"), "Janus") if source.is_dir() else source
    beside = options.config or path.parent / "config.json"
    config = read_mapping(beside) if options.config or beside.is_file() else {}
    weights = below(read_weights(path), PREFIXES, "encoder.conv_in.weight", path)
    theirs = not any(name.startswith("encoder.conv_blocks.") for name in weights)
    levels = count_levels(weights, TAMING_LEVELS if theirs else LEVELS, path)
    resolution = options.resolution or _resolution(config, levels, beside)
    notes = () if resolution else (f"resolution {DEFAULT_RESOLUTION}: no config.json says it (--resolution)",)
    if not theirs:
        if options.like_transformers:
            raise UserError(f"{path}: has DeepSeek's names; --like-transformers is for a model that transformers saved")
        part = llamagen_vqgan(weights, resolution or DEFAULT_RESOLUTION, path)
        return replace(part, notes=(*part.notes, *notes))
    found = Inferred(weights, janus_name, levels, path)
    quantizer = quantizer_settings(True, **({"raw_search": True} if options.like_transformers else {}))
    ours = found.config(resolution or DEFAULT_RESOLUTION, quantizer, found.shape(CODEBOOK)[:2])
    return vqgan_part(ours, weights, janus_name, codebook_rules(), path, notes=notes)


def _resolution(config: dict[str, Any], levels: int, where: Path) -> int | None:
    """transformers' config counts the patches of a side."""
    patches = config.get("vq_config", config).get("num_patches") if isinstance(config.get("vq_config", config), dict) else None
    if patches is None:
        return None
    if not isinstance(patches, int) or not 0 < patches <= 1024:
        raise UserError(f"{where}: num_patches {patches!r}: expected the codes of a side")
    return patches << (levels - 1)
