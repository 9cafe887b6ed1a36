"""diffusers' VQModel, in and out (the tokenizer of aMUSEd and VQ-Diffusion among others).

Attention projections are linear layers there and 1x1 convolutions here. Codes are the nearest
codebook rows.
"""

# Axes: C channels, K codebook size, D length of a code vector

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from inference.checkpoints.files.weight_choice import AVERAGE, RAW, ChosenWeights
from inference.checkpoints.files.weight_sets import WeightsLayout
from inference.checkpoints.files.weights_file import find_weights, read_weights
from inference.checkpoints.formats.vqgan_names import (
    ATTENTION_MATRIX,
    CODEBOOK,
    DEFAULT_RESOLUTION,
    LANDMARK,
    MAX_LEVELS,
    NORM_GROUPS,
    VQGANShapes,
    codebook_rules,
    diffusers_name,
    quantizer_settings,
    vqgan_part,
)
from inference.checkpoints.options import ConvertOptions
from inference.checkpoints.rules import ConvertedPart
from tokenizer_image import VQGAN, VQGANConfig
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import MissingFileError, UserError

STEMS = ("diffusion_pytorch_model", "diffusion_pytorch_model.fp16", "model")
RAW_STEM = "diffusion_pytorch_model.non_ema"
"""The raw weights, where the file without `.non_ema` holds their average."""
LAYOUT = WeightsLayout((LANDMARK,))
SUBFOLDERS = ("vqvae", "movq", "vae")  # of a pipeline's folder
_ATTENTION_BEFORE_0_17 = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.",
                          ".proj_attn.": ".to_out.0."}
_ONLY_VALUES = {"act_fn": ("silu", "swish"), "norm_type": ("group",)}
"""Fields of VQModel's config with the values that our VQGAN implements."""
_DOWN, _DOWN_ATTENTION = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
_UP, _UP_ATTENTION = "UpDecoderBlock2D", "AttnUpDecoderBlock2D"


def convert(source: Path, options: ConvertOptions) -> ConvertedPart:
    """The folder of a VQModel, or of a pipeline with one in vqvae/."""
    options.refuse_unread("diffusers-vq", "resolution", "weight_set")
    folder = vq_folder(source)
    path = folder / "config.json"
    config = read_mapping(path)
    for name, values in _ONLY_VALUES.items():
        if config.get(name, values[0]) not in values:
            raise UserError(f"{path}: {name} {config[name]!r} is not what a VQGAN here has "
                            f"({' or '.join(values)})")

    chosen = _read_chosen(folder, options.weight_set)
    weights = {_current_name(name): tensor for name, tensor in chosen.tensors.items()}
    # levels by the config and not by the tensors, so that a missing level is reported by its names
    widths = config.get("block_out_channels")
    levels = len(widths) if isinstance(widths, list) else 0
    if not 1 <= levels <= MAX_LEVELS:
        raise UserError(f"{path}: block_out_channels {widths!r}: expected a width for each level")

    resolution = options.resolution or DEFAULT_RESOLUTION
    notes = chosen.notes
    if options.resolution is None:
        notes += (f"resolution {resolution}: a VQModel's config does not say it (--resolution)",)
    shapes = VQGANShapes(weights, diffusers_name, levels, folder)
    quantizer = quantizer_settings(l2_normalize=False)  # it searches by plain distance
    norm_groups = config.get("norm_num_groups", NORM_GROUPS)
    ours = shapes.config(resolution, quantizer, shapes.code_shape(), norm_groups)
    _compare(config, ours, path)
    return vqgan_part(ours, weights, diffusers_name, codebook_rules(), folder, notes=notes)


def _read_chosen(folder: Path, weight_set: str | None) -> ChosenWeights:
    """The weights of a folder; of the average and the raw ones, which are files of their own.

    UserError if --weight-set asks for one that is not there.
    """
    average, raw = _has(folder, *STEMS), _has(folder, RAW_STEM)
    if not (average and raw):
        path = find_weights(folder, (*STEMS, RAW_STEM), "a VQModel")
        return read_weights(path, LAYOUT, weight_set)

    if weight_set not in (None, RAW, AVERAGE):
        raise UserError(f"--weight-set {weight_set}: {folder} holds {AVERAGE} and {RAW}; give one "
                        "of them")
    takes_raw = weight_set == RAW
    path = find_weights(folder, (RAW_STEM,) if takes_raw else STEMS, "a VQModel")
    other = find_weights(folder, STEMS if takes_raw else (RAW_STEM,), "a VQModel")
    taken, given = ("raw weights", AVERAGE) if takes_raw else ("average", RAW)
    note = (f"took the {taken} `{path.name}`; also there: `{other.name}` "
            f"(--weight-set {given})")
    return replace(read_weights(path, LAYOUT), is_average=not takes_raw, notes=(note,))


def _has(folder: Path, *stems: str) -> bool:
    try:
        find_weights(folder, stems, "a VQModel")
    except MissingFileError:
        return False
    return True


def vq_folder(source: Path) -> Path:
    """The folder of the VQModel itself. UserError if `source` holds another class or none."""
    for folder in (source, *(source / name for name in SUBFOLDERS)):
        path = folder / "config.json"
        if path.is_file():
            class_name = read_mapping(path).get("_class_name")
            if class_name == "VQModel":
                return folder
            if folder == source:  # a pipeline's vae/ may well be another class
                raise UserError(f"{path}: _class_name is {class_name!r}, expected 'VQModel'")
    raise MissingFileError(f"{source}: no config.json of a VQModel in it; give the folder that "
                           "save_pretrained wrote")


def _current_name(name: str) -> str:
    """The name of a tensor since diffusers 0.17, which renamed attention."""
    if ".attentions." in name:
        for old, new in _ATTENTION_BEFORE_0_17.items():
            name = name.replace(old, new)
    return name


def _compare(config: dict[str, Any], ours: VQGANConfig, path: Path) -> None:
    """UserError if config.json describes another model than the tensors, as in diffusers."""
    for name, value in diffusers_config(ours).items():
        stated = config.get(name)
        if stated is None:  # older releases wrote fewer fields
            continue
        found = list(value) if isinstance(value, tuple) else value  # JSON has no tuples
        if stated != found:
            raise UserError(f"{path}: {name} {stated!r}, but the weights have {value!r}; the "
                            "folder is damaged")


def diffusers_config(config: VQGANConfig) -> dict[str, Any]:
    """The arguments of `VQModel` that give the same network."""
    # the decoder's levels are listed in running order, from the coarsest
    attends = [side in config.attention_resolutions for side in config.level_resolutions]
    down = tuple(_DOWN_ATTENTION if attention else _DOWN for attention in attends)
    up = tuple(_UP_ATTENTION if attention else _UP for attention in reversed(attends))
    widths = tuple(config.channels * multiplier for multiplier in config.channel_multipliers)
    return {
        "in_channels": config.in_channels, "out_channels": config.in_channels,
        "down_block_types": down, "up_block_types": up, "block_out_channels": widths,
        "layers_per_block": config.num_res_blocks, "latent_channels": config.z_channels,
        "num_vq_embeddings": config.codebook_size, "vq_embed_dim": config.embed_dim,
        "norm_num_groups": config.norm_groups, "mid_block_add_attention": config.mid_attention,
    }


def diffusers_state(tokenizer: VQGAN) -> dict[str, Tensor]:
    """All weights under diffusers' names; the codebook at unit length with l2_normalize."""
    levels = len(tokenizer.config.channel_multipliers)
    state = {CODEBOOK: tokenizer.codebook.detach().clone()}  # [K, D]
    for name, tensor in tokenizer.state_dict().items():
        if not name.startswith("quantizer."):
            state[diffusers_name(name, levels)] = as_linear(name, tensor)
    return state


def as_linear(name: str, tensor: Tensor) -> Tensor:
    """An attention's 1x1 convolution [C, C, 1, 1] as a matrix [C, C]; other tensors unchanged."""
    return tensor[:, :, 0, 0] if ATTENTION_MATRIX.search(name) else tensor
