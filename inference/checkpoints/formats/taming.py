"""VQGANs of taming-transformers (Esser et al. 2021, https://arxiv.org/abs/2012.09841) and of latent diffusion's first stages.

Their names are ours, but for the quantizer: a codebook learned by gradient (VectorQuantizer2) or by moving average, or
GumbelVQ's projection to logits of codes.
"""

# Axes: K codebook size, D length of a code vector, L levels

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from inference.checkpoints.files.weights_file import SUFFIXES, below, read_weights
from inference.checkpoints.formats.vqgan_names import (
    CODEBOOK,
    DEFAULT_RESOLUTION,
    Inferred,
    codebook_rules,
    count_levels,
    quantizer_settings,
    taming_name,
    vqgan_part,
)
from inference.checkpoints.options import ConvertOptions
from inference.checkpoints.rules import ConvertedPart, Rule
from tokenizer_image import VQGANConfig
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import MissingFileError, UserError

LEVELS = r"encoder\.down\.(\d+)\."
PREFIXES = ("", "first_stage_model.", "model.", "vae.", "vqvae.")
"""Where a VQGAN stands in larger checkpoints: taming's and latent diffusion's second stages, ruDALL-E."""
IGNORED = ("loss.*", "discriminator.*", "perceptual_loss.*", "model_ema.*", "colorize")
_MOVING = ("quantize.embedding.cluster_size", "quantize.embedding.embed_avg")
_GUMBEL = {"quantizer.proj.weight": "quantize.proj.weight", "quantizer.proj.bias": "quantize.proj.bias",
           "quantizer.embed.weight": "quantize.embed.weight"}


def convert(source: Path, options: ConvertOptions) -> ConvertedPart:
    """A `.ckpt`, `.pt` or `.safetensors` file, or the folder of a run (checkpoints/last.ckpt and configs/*.yaml)."""
    options.only("taming", "config", "resolution")
    path = _in_folder(source) if source.is_dir() else source
    settings = options.config or _beside(source, path)
    weights = below(read_weights(path), PREFIXES, "encoder.conv_in.weight", path)
    written = _written(settings) if settings else {}
    resolution = _resolution(written, options, settings)
    notes = () if resolution else (f"resolution {DEFAULT_RESOLUTION}: without its yaml the file does not say it "
                                   "(--config, --resolution)",)
    part = taming_vqgan(weights, resolution or DEFAULT_RESOLUTION, path, notes)
    _compare(written, part.config, settings)
    return part


def taming_vqgan(weights: Mapping[str, Tensor], resolution: int, where: Path, notes: tuple[str, ...] = ()) -> ConvertedPart:
    """A VQGAN under taming's names; the quantizer's kind follows from its tensors."""
    if "quantize.used" in weights:
        raise UserError(f"{where}: its codes are renumbered (quantize.used, taming's remap), which has no place here; "
                        "give the checkpoint that it was made from")
    levels = count_levels(weights, LEVELS, where)
    found = Inferred(weights, taming_name, levels, where)
    if "quantize.proj.weight" in weights:
        codes = _matrix(weights, "quantize.embed.weight", where)
        config = found.config(resolution, {"kind": "gumbel"}, codes)
        rules = {ours: Rule((theirs,)) for ours, theirs in _GUMBEL.items()}
        return vqgan_part(config, weights, taming_name, rules, where, IGNORED, notes)
    by_average = _MOVING[0] in weights
    quantizer = quantizer_settings(False, **({"learn_codebook_by_gradient": False} if by_average else {}))
    config = found.config(resolution, quantizer, _matrix(weights, CODEBOOK, where))
    return vqgan_part(config, weights, taming_name, _moving_rules() if by_average else codebook_rules(), where, IGNORED, notes)


def _matrix(weights: Mapping[str, Tensor], name: str, where: Path) -> tuple[int, int]:
    if name not in weights or weights[name].ndim != 2:
        raise UserError(f"{where}: lacks the codebook {name}, so it is another kind of autoencoder")
    rows, columns = weights[name].shape
    return rows, columns


def _moving_rules() -> dict[str, Rule]:
    """A codebook that follows a moving average, with the averages as they were."""
    rules, place = codebook_rules(), "quantizer.vq._codebook."
    return {**rules, f"{place}cluster_size": Rule((_MOVING[0],), lambda use: use[None]),
            f"{place}embed_avg": Rule((_MOVING[1],), lambda sums: sums[None])}


def _in_folder(folder: Path) -> Path:
    """The one checkpoint of a run's folder; last.ckpt where there are several."""
    found = sorted(path for place in (folder, folder / "checkpoints") if place.is_dir()
                   for path in place.iterdir() if path.suffix in SUFFIXES)
    named = [path for path in found if path.stem in ("last", "model", "vqgan")]
    if len(named or found) != 1:
        raise MissingFileError(f"{folder}: holds {len(found)} weights files, and none alone is last.ckpt; give the file itself")
    return (named or found)[0]


def _beside(source: Path, path: Path) -> Path | None:
    """The yaml that belongs to a checkpoint, where there is one and no other."""
    places = [path.parent, path.parent.parent / "configs"] if not source.is_dir() else [source, source / "configs", path.parent]
    found = {item.resolve(): item for place in places if place.is_dir() for pattern in ("*model*.yaml", "*project*.yaml")
             for item in sorted(place.glob(pattern))}
    own = path.with_suffix(".yaml")
    return own if own.is_file() else next(iter(found.values())) if len(found) == 1 else None


def _written(path: Path) -> dict[str, Any]:
    """What a yaml of taming says of the model, by the names of our fields."""
    values = read_mapping(path)
    try:
        params = values["model"]["params"]
        params = params.get("first_stage_config", {}).get("params", params)  # a second stage's yaml describes the first in it
        shape = params["ddconfig"]
        said = {"resolution": shape["resolution"], "in_channels": shape["in_channels"], "channels": shape["ch"],
                "channel_multipliers": tuple(shape["ch_mult"]), "num_res_blocks": shape["num_res_blocks"],
                "attention_resolutions": tuple(shape["attn_resolutions"]), "z_channels": shape["z_channels"],
                "embed_dim": params["embed_dim"], "codebook_size": params["n_embed"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the yaml of a VQGAN: model.params has no {one_key(error)}") from None
    if shape.get("double_z"):
        raise UserError(f"{path}: double_z true is an autoencoder without codes; there is nothing to tokenize with")
    for name in ("tanh_out", "give_pre_end"):  # of latent diffusion's decoder; no tensor shows them
        if shape.get(name):
            raise UserError(f"{path}: {name} true is another end of the decoder than a VQGAN has here; it is not converted")
    return said


def one_key(error: Exception) -> str:
    """The key that a KeyError is about."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else "ddconfig with its fields"


def _resolution(written: dict[str, Any], options: ConvertOptions, settings: Path | None) -> int | None:
    said = written.get("resolution")
    if said is not None and not (isinstance(said, int) and 0 < said <= 1 << 14):
        raise UserError(f"{settings}: resolution {said!r}: expected pixels of a side")
    if said and options.resolution and said != options.resolution:
        raise UserError(f"--resolution {options.resolution}: {settings} says {said}; leave --resolution out")
    return said or options.resolution


def _compare(written: dict[str, Any], config: VQGANConfig, settings: Path | None) -> None:
    """UserError when the yaml describes another model than the tensors."""
    for name, said in written.items():
        found = getattr(config, name)
        if name == "attention_resolutions":  # taming passes over one that no level has
            differs = {side for side in config.level_resolutions if side in said} != set(found)
        else:
            differs = said != found
        if differs:
            raise UserError(f"{settings}: {name} {said!r}, but the weights have {found!r}; give the yaml of this checkpoint")
