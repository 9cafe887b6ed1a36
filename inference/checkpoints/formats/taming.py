"""VQGANs of taming-transformers (https://arxiv.org/abs/2012.09841) and of latent diffusion.

Tensor names are ours except in the quantizer: a codebook learned by gradient (VectorQuantizer2) or
by moving average (EMAVectorQuantizer), or GumbelVQ's projection to logits of codes.
"""

# Axes: K codebook size, D length of a code vector

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from inference.checkpoints.files.weight_sets import WeightsLayout, is_average_name
from inference.checkpoints.files.weights_file import SUFFIXES, read_weights
from inference.checkpoints.formats.vqgan_names import (
    CODEBOOK,
    DEFAULT_RESOLUTION,
    LANDMARK,
    VQGANShapes,
    add_head_axis,
    codebook_rules,
    count_levels,
    quantizer_settings,
    taming_name,
    vqgan_part,
)
from inference.checkpoints.options import ConvertOptions, agreed_resolution
from inference.checkpoints.rules import ConvertedPart, Rule
from tokenizer_image import VQGANConfig
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import MissingFileError, UserError

LEVELS = r"encoder\.down\.(\d+)\."
# prefixes in larger checkpoints: second stages of taming and latent diffusion, ruDALL-E
LAYOUT = WeightsLayout((LANDMARK,), ("", "first_stage_model.", "vae.", "vqvae."))
# of training only. model_ema: latent diffusion's averages, whose names have lost their dots;
# colorize: a random projection to look at segmentations with
IGNORED = ("loss.*", "discriminator.*", "perceptual_loss.*", "model_ema.*", "colorize")
CLUSTER_SIZE, EMBED_AVG = "quantize.embedding.cluster_size", "quantize.embedding.embed_avg"
_GUMBEL_RULES = {f"quantizer.{part}": Rule((f"quantize.{part}",))
                 for part in ("proj.weight", "proj.bias", "embed.weight")}


def convert(source: Path, options: ConvertOptions) -> ConvertedPart:
    """A `.ckpt`, `.pt` or `.safetensors` file, or a run's folder (checkpoints/ and configs/)."""
    options.refuse_unread("taming", "config", "resolution", "weight_set")
    path, notes = _checkpoint_of(source) if source.is_dir() else (source, ())
    yaml_path = options.config or _find_yaml(source, path)
    weights = read_weights(path, LAYOUT, options.weight_set)
    in_yaml = _read_yaml(yaml_path) if yaml_path else {}  # the weights are enough without it

    resolution = agreed_resolution(in_yaml.get("resolution"), options.resolution, yaml_path)
    notes += weights.notes
    if resolution is None:
        notes += (f"resolution {DEFAULT_RESOLUTION}: without its yaml the file does not say it "
                  "(--config, --resolution)",)
    part = taming_vqgan(weights.tensors, resolution or DEFAULT_RESOLUTION, path, notes)
    _compare(in_yaml, part.config, yaml_path)  # the tensors decide; another yaml is a mistake
    return part


def taming_vqgan(weights: Mapping[str, Tensor], resolution: int, where: Path,
                 notes: tuple[str, ...] = ()) -> ConvertedPart:
    """A VQGAN under taming's names; its tensors tell which quantizer it has."""
    if "quantize.used" in weights:
        raise UserError(f"{where}: its codes are renumbered (quantize.used, taming's remap), which "
                        "has no place here; give the checkpoint that it was made from")
    shapes = VQGANShapes(weights, taming_name, count_levels(weights, LEVELS, where), where)

    if "quantize.proj.weight" in weights:
        code_shape = _codebook_shape(weights, "quantize.embed.weight", where)
        settings: dict[str, Any] = {"kind": "gumbel"}  # the other settings only matter in training
        rules = _GUMBEL_RULES
    elif CLUSTER_SIZE in weights:
        code_shape = _codebook_shape(weights, CODEBOOK, where)
        settings = quantizer_settings(l2_normalize=False, learn_codebook_by_gradient=False)
        rules = _moving_average_rules()
    else:
        code_shape = _codebook_shape(weights, CODEBOOK, where)
        settings = quantizer_settings(l2_normalize=False)
        rules = codebook_rules()

    config = shapes.config(resolution, settings, code_shape)
    return vqgan_part(config, weights, taming_name, rules, where, IGNORED, notes)


def _codebook_shape(weights: Mapping[str, Tensor], name: str, where: Path) -> tuple[int, int]:
    """[K, D] of the codebook called `name`."""
    if name not in weights or weights[name].ndim != 2:
        raise UserError(f"{where}: lacks the codebook {name}, so it is another kind of autoencoder")
    codes, length = weights[name].shape
    return codes, length


def _moving_average_rules() -> dict[str, Rule]:
    """Keep the moving averages too: training goes on from them."""
    prefix = "quantizer.vq._codebook."
    return {**codebook_rules(),
            f"{prefix}cluster_size": Rule((CLUSTER_SIZE,), add_head_axis),
            f"{prefix}embed_avg": Rule((EMBED_AVG,), add_head_axis)}


def _checkpoint_of(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """The only checkpoint in a run's folder, or the one called last, model or vqgan, and notes."""
    found = []
    for place in (folder, folder / "checkpoints"):
        if place.is_dir():
            found += [path for path in place.iterdir() if path.suffix in SUFFIXES]
    # Lightning keeps last.ckpt beside epoch=000012.ckpt; downloads are called model or vqgan
    named = [path for path in found if path.stem in ("last", "model", "vqgan")]
    candidates = named or found
    if len(candidates) != 1:
        raise MissingFileError(f"{folder}: holds {len(found)} weights files, and none alone is "
                               "last.ckpt; give the file itself")
    taken = candidates[0]
    averages = sorted(path.name for path in found if path != taken and is_average_name(path.stem))
    if not averages:
        return taken, ()
    return taken, (f"took {taken.name}; also there: {', '.join(averages)}, an average by its "
                   "name (give the file itself)",)


def _find_yaml(source: Path, path: Path) -> Path | None:
    """The yaml with the checkpoint's own name, else the only model or project yaml near it."""
    own = path.with_suffix(".yaml")  # as our export writes it
    if own.is_file():
        return own

    # a run's folder: DATE-model.yaml or DATE-project.yaml in configs/, beside checkpoints/
    if source.is_dir():
        places = [source, source / "configs", path.parent]
    else:
        places = [path.parent, path.parent.parent / "configs"]
    found: dict[Path, Path] = {}  # resolved -> as found: the places may be one folder
    for place in places:
        if place.is_dir():
            for pattern in ("*model*.yaml", "*project*.yaml"):
                found |= {item.resolve(): item for item in place.glob(pattern)}
    return next(iter(found.values())) if len(found) == 1 else None


def _read_yaml(path: Path) -> dict[str, Any]:
    """The fields of our config that taming's yaml states. UserError for another model."""
    values = read_mapping(path)
    try:
        params = values["model"]["params"]
        # the yaml of a second stage (a transformer, a diffusion model) describes the VQGAN inside
        params = params.get("first_stage_config", {}).get("params", params)
        shape = params["ddconfig"]
        fields = {
            "resolution": shape["resolution"], "in_channels": shape["in_channels"],
            "channels": shape["ch"], "channel_multipliers": tuple(shape["ch_mult"]),
            "num_res_blocks": shape["num_res_blocks"],
            "attention_resolutions": tuple(shape["attn_resolutions"]),
            "z_channels": shape["z_channels"],
            "embed_dim": params["embed_dim"], "codebook_size": params["n_embed"]}
    except KeyError as error:
        raise _not_a_vqgan(path, str(error.args[0])) from None
    except (TypeError, AttributeError):
        raise _not_a_vqgan(path, "ddconfig with its fields") from None

    if shape.get("double_z"):  # mean and variance: latent diffusion's KL autoencoders
        raise UserError(f"{path}: double_z true is an autoencoder without codes; there is nothing "
                        "to tokenize with")
    for name in ("tanh_out", "give_pre_end"):  # of latent diffusion's decoder; no tensor shows them
        if shape.get(name):
            raise UserError(f"{path}: {name} true is another end of the decoder than a VQGAN has "
                            "here; it is not converted")
    return fields


def _not_a_vqgan(path: Path, lacking: str) -> UserError:
    return UserError(f"{path}: not the yaml of a VQGAN: model.params has no {lacking}")


def _compare(in_yaml: dict[str, Any], config: VQGANConfig, yaml_path: Path | None) -> None:
    """UserError if the yaml describes another model than the tensors."""
    for name, stated in in_yaml.items():
        found = getattr(config, name)
        if name == "attention_resolutions":
            # taming ignores a resolution that no level has
            differs = {side for side in config.level_resolutions if side in stated} != set(found)
        else:
            differs = stated != found
        if differs:
            raise UserError(f"{yaml_path}: {name} {stated!r}, but the weights have {found!r}; give "
                            "the yaml of this checkpoint")
