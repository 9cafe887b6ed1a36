"""diffusers' VQModel, in and out (aMUSEd's and VQ-Diffusion's tokenizers among others).

Attention projections are linear layers there and 1x1 convolutions here. Codes are the nearest rows of the codebook.
"""

# Axes: C channels, K codebook size, D length of a code vector

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from inference.checkpoints.files.weights_file import find_weights, read_weights
from inference.checkpoints.formats.vqgan_names import (
    CODEBOOK,
    DEFAULT_RESOLUTION,
    NORM_GROUPS,
    PROJECTION,
    Inferred,
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

STEMS = ("diffusion_pytorch_model", "diffusion_pytorch_model.fp16", "diffusion_pytorch_model.non_ema", "model")
PLACES = ("vqvae", "movq", "vae")
_OLD = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
_SAME = {"act_fn": ("silu", "swish"), "norm_type": ("group",)}
"""Fields of their config with the values that our VQGAN has."""
_DOWN, _UP = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")


def convert(source: Path, options: ConvertOptions) -> ConvertedPart:
    """The folder of a VQModel, or of a pipeline that has one in vqvae/."""
    options.only("diffusers-vq", "resolution")
    folder = vq_folder(source)
    config = read_mapping(folder / "config.json")
    where = folder / "config.json"
    for name, values in _SAME.items():
        if config.get(name, values[0]) not in values:
            raise UserError(f"{where}: {name} {config[name]!r} is not what a VQGAN here has ({' or '.join(map(str, values))})")
    weights = {_renamed(name): tensor for name, tensor in read_weights(find_weights(folder, STEMS, "a VQModel")).items()}
    widths = config.get("block_out_channels")
    levels = len(widths) if isinstance(widths, list) else 0
    if not 1 <= levels <= 12:
        raise UserError(f"{where}: block_out_channels {widths!r}: expected a width for each level")
    found = Inferred(weights, diffusers_name, levels, folder)
    resolution = options.resolution or DEFAULT_RESOLUTION
    notes = () if options.resolution else (f"resolution {resolution}: a VQModel's config does not say it (--resolution)",)
    ours = found.config(resolution, quantizer_settings(l2_normalize=False), found.shape(CODEBOOK)[:2],
                        config.get("norm_num_groups", NORM_GROUPS))
    _compare(config, ours, where)
    return vqgan_part(ours, weights, diffusers_name, codebook_rules(), folder, notes=notes)


def vq_folder(source: Path) -> Path:
    """The folder of the VQModel itself. UserError when it is one of another class."""
    for folder in (source, *(source / place for place in PLACES)):
        if (folder / "config.json").is_file():
            name = read_mapping(folder / "config.json").get("_class_name")
            if name == "VQModel":
                return folder
            if folder != source:
                continue
            raise UserError(f"{folder / 'config.json'}: _class_name is {name!r}, expected 'VQModel'")
    raise MissingFileError(f"{source}: no config.json of a VQModel in it; give the folder that save_pretrained wrote")


def _renamed(name: str) -> str:
    """Names that attention had before diffusers 0.17."""
    if ".attentions." in name:
        for old, new in _OLD.items():
            name = name.replace(old, new)
    return name


def _compare(config: dict[str, Any], ours: VQGANConfig, where: Path) -> None:
    """UserError when config.json describes another model than the tensors: diffusers itself would not load them."""
    for name, value in diffusers_config(ours).items():
        said = config.get(name)
        if name in config and said is not None and name not in ("lookup_from_codebook", "sample_size") and (
                list(value) if isinstance(value, tuple) else value) != said:
            raise UserError(f"{where}: {name} {said!r}, but the weights have {value!r}; the folder is damaged")


def diffusers_config(config: VQGANConfig) -> dict[str, Any]:
    """The arguments of `VQModel` that give the same network."""
    attends = [side in config.attention_resolutions for side in config.level_resolutions]
    return {
        "in_channels": config.in_channels, "out_channels": config.in_channels,
        "down_block_types": tuple(_DOWN[yes] for yes in attends),
        "up_block_types": tuple(_UP[yes] for yes in reversed(attends)),
        "block_out_channels": tuple(config.channels * multiplier for multiplier in config.channel_multipliers),
        "layers_per_block": config.num_res_blocks, "latent_channels": config.z_channels,
        "num_vq_embeddings": config.codebook_size, "vq_embed_dim": config.embed_dim,
        "norm_num_groups": config.norm_groups, "mid_block_add_attention": config.mid_attention,
    }


def diffusers_state(tokenizer: VQGAN) -> dict[str, Tensor]:
    """All weights of our tokenizer under diffusers' names; the codebook as it is compared (unit length with l2_normalize)."""
    levels = len(tokenizer.config.channel_multipliers)
    state = {CODEBOOK: tokenizer.codebook.detach().clone()}  # [K, D]
    for name, tensor in tokenizer.state_dict().items():
        if not name.startswith("quantizer."):
            state[diffusers_name(name, levels)] = as_linear(name, tensor)
    return state


def as_linear(name: str, tensor: Tensor) -> Tensor:
    """Our attention's 1x1 convolution `name` [C, C, 1, 1] as a matrix [C, C]; anything else as it is."""
    return tensor[:, :, 0, 0] if PROJECTION.search(name) else tensor
