"""Write our image tokenizers and transformers as other projects' checkpoints, bit-exact.

A config field that the other project's code cannot express is refused by name, never approximated.
"""

# Axes: C channels, K codebook size, D length of a code vector

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from inference.checkpoints.export_float16 import to_float16
from inference.checkpoints.export_llamagen_gpt import llamagen_state
from inference.checkpoints.formats.diffusers_vq import as_linear, diffusers_config
from inference.checkpoints.formats.vqgan_names import (
    CODEBOOK,
    NORM_GROUPS,
    Naming,
    diffusers_name,
    llamagen_name,
    taming_name,
)
from inference.checkpoints.rules import tensor_names
from inference.checkpoints.stored import read_checked
from inference.conversions import check_exported_path
from inference.model_folder import INDEX_NAME as MODEL_INDEX
from inference.model_folder import PARTS
from tokenizer_image import VQGAN, VQGANConfig
from tokenloom_common.errors import RunFailedError, UserError, choose, one_line
from tokenloom_common.files import (
    atomic_folder,
    naming_path,
    sync_path,
    write_json_atomic,
    write_text_atomic,
)
from tokenloom_common.hub import resolve_folder
from tokenloom_common.pretrained import read_config
from tokenloom_common.tensor_writer import write_shards, write_tensors

DIFFUSERS_VERSION = "0.42.1"  # the release that these files were tested with
DIFFUSERS_STEM = "diffusion_pytorch_model"
CODEBOOK_USED_SLOTS = 65_536
"""Length of a training statistic that LlamaGen's strict loading wants to find."""
_BOOK = "quantizer.vq._codebook.embed"  # [1, K, D]


class _StoredVQGAN(NamedTuple):
    """A VQGAN's config and tensors as they are on disk, and its folder."""

    config: VQGANConfig
    tensors: dict[str, Tensor]
    folder: Path


def export_checkpoint(kind: str, folder: str | Path, out: str | Path) -> Path:
    """Write one of our folders as another project's checkpoint -> the path written.

    kind: a name in EXPORTERS; float16 is no other project's: our own folder, rounded.
    folder: an image tokenizer's, a transformer's, or a whole model folder. out: a file that does
    not exist (a folder for diffusers-vq and float16). UserError naming the field that the other
    project's code cannot express.
    """
    exporter = choose(EXPORTERS, kind, "kind of checkpoint to export")
    path = check_exported_path(kind, out)
    return exporter(resolve_folder(folder), path)


def _read_vqgan(folder: Path) -> _StoredVQGAN:
    """The VQGAN in its own folder, or within a model folder."""
    place = folder / PARTS[0] if (folder / MODEL_INDEX).is_file() else folder
    config = read_config(place, VQGAN.kind, VQGANConfig)
    return _StoredVQGAN(config, read_checked(VQGAN, config, place), place)


def _refuse(stored: _StoredVQGAN, project: str, wanted: Mapping[str, Any]) -> None:
    """UserError for the first field that differs from the other project's code.

    wanted: field (`quantizer.` before those of the quantizer) -> its value there, a set if several
    can be expressed.
    """
    config = stored.config
    if not config.has_encoder:
        raise UserError(f"{stored.folder}: has no encoder (has_encoder False), and {project}'s "
                        "files have one; it cannot be exported")
    # constants of the code of all these projects; None stands for the encoder's value
    common: dict[str, Any] = {
        "norm_groups": NORM_GROUPS, "norm_eps": 1e-6,
        "input_range": "signed", "output_range": "signed",
        "decoder_channels": {None, config.channels},
        "decoder_res_blocks": {None, config.num_res_blocks}}

    for name, value in {**common, **wanted}.items():
        owner: Any = config.quantizer if name.startswith("quantizer.") else config
        found = getattr(owner, name.removeprefix("quantizer."))
        allowed = value if isinstance(value, set) else {value}
        if found not in allowed:
            shown = value
            if isinstance(value, set):  # sorted: the order of a set differs from run to run
                shown = " or ".join(sorted(map(str, value - {None})))
            raise UserError(f"{stored.folder}: {project} cannot express {name} {found!r}, only "
                            f"{shown!r}; try another kind")


def _renamed(stored: _StoredVQGAN, naming: Naming) -> dict[str, Tensor]:
    """All tensors but the quantizer's, under another project's names."""
    levels = len(stored.config.channel_multipliers)
    names = tensor_names(VQGAN, stored.config)
    return {naming(name, levels): stored.tensors[name]
            for name in names if not name.startswith("quantizer.")}


def _to_taming(folder: Path, out: Path) -> Path:
    """OUT.ckpt or OUT.safetensors, and the yaml beside it."""
    stored = _read_vqgan(folder)
    quantizer, tensors = stored.config.quantizer, stored.tensors
    gumbel = quantizer.kind == "gumbel"
    # its middle block has attention whatever the config says
    wanted: dict[str, Any] = {"mid_attention": True, "quantizer.kind": {"vq", "gumbel"}}
    if not gumbel:  # GumbelVQ compares no vectors
        wanted["quantizer.l2_normalize"] = False
    _refuse(stored, "taming-transformers", wanted)

    state = _renamed(stored, taming_name)
    if gumbel:
        for part in ("proj.weight", "proj.bias", "embed.weight"):
            state[f"quantize.{part}"] = tensors[f"quantizer.{part}"]
    else:
        state[CODEBOOK] = tensors[_BOOK][0]  # [K, D]
        if not quantizer.learn_codebook_by_gradient:
            # EMAVectorQuantizer goes on from these averages
            for part in ("cluster_size", "embed_avg"):
                state[f"quantize.embedding.{part}"] = tensors[f"quantizer.vq._codebook.{part}"][0]

    _write_file(out, "state_dict", state)
    config_text = yaml.safe_dump(_taming_yaml(stored.config), sort_keys=False)
    write_text_atomic(out.with_suffix(".yaml"), config_text)
    return out


def _taming_yaml(config: VQGANConfig) -> dict[str, Any]:
    """The model section of taming's yaml, with a loss that does nothing."""
    if config.quantizer.kind == "gumbel":
        target = "GumbelVQ"
    else:  # the class decides how the codebook would be trained further
        target = "VQModel" if config.quantizer.learn_codebook_by_gradient else "EMAVQ"
    return {"model": {"target": f"taming.models.vqgan.{target}", "params": {
        "embed_dim": config.embed_dim, "n_embed": config.codebook_size, "ddconfig": {
            "double_z": False, "z_channels": config.z_channels, "resolution": config.resolution,
            "in_channels": config.in_channels, "out_ch": config.in_channels, "ch": config.channels,
            "ch_mult": list(config.channel_multipliers), "num_res_blocks": config.num_res_blocks,
            "attn_resolutions": list(config.attention_resolutions), "dropout": config.dropout},
        "lossconfig": {"target": "taming.modules.losses.vqperceptual.DummyLoss"}}}}


def _to_llamagen(folder: Path, out: Path) -> Path:
    """A `.pt` file that LlamaGen's VQ models load."""
    stored = _read_vqgan(folder)
    # its code puts attention on the last level, whatever the resolution
    coarsest = stored.config.level_resolutions[-1]
    _refuse(stored, "LlamaGen", {
        "mid_attention": True, "attention_resolutions": (coarsest,), "quantizer.kind": "vq",
        "quantizer.l2_normalize": True, "quantizer.raw_search": False})

    state = _renamed(stored, llamagen_name)
    state[CODEBOOK] = stored.tensors[_BOOK][0]  # [K, D]
    state["quantize.codebook_used"] = torch.zeros(CODEBOOK_USED_SLOTS)
    _write_file(out, "model", state)
    return out


def _to_diffusers(folder: Path, out: Path) -> Path:
    """The folder that `VQModel.from_pretrained` loads; unit-length codes are written normalised."""
    stored = _read_vqgan(folder)
    config = stored.config
    # any number of groups: its config states it. raw_search: transformers' Janus alone searches so
    _refuse(stored, "diffusers", {
        "norm_groups": config.norm_groups, "quantizer.kind": "vq", "quantizer.raw_search": False})
    if config.channel_multipliers[0] != 1:  # its first convolution has the first level's width
        raise UserError(f"{stored.folder}: diffusers cannot express channel_multipliers "
                        f"{config.channel_multipliers}, only ones that begin with 1; export it as "
                        "another kind")

    levels = len(config.channel_multipliers)
    state = {diffusers_name(name, levels): as_linear(name, stored.tensors[name])
             for name in tensor_names(VQGAN, config) if not name.startswith("quantizer.")}
    book = stored.tensors[_BOOK][0]  # [K, D]
    if config.quantizer.l2_normalize:
        # diffusers searches by distance: the same as by angle among codes of length 1
        book = F.normalize(book.float(), dim=1).to(book.dtype)
    state[CODEBOOK] = book

    settings = {
        "_class_name": "VQModel", "_diffusers_version": DIFFUSERS_VERSION, "act_fn": "silu",
        **diffusers_config(config),
        "norm_type": "group", "lookup_from_codebook": True, "sample_size": config.resolution}
    with atomic_folder(out, ()) as aside:  # (): no file of an older export is replaced
        write_shards(aside, _on_meta(state), state.__getitem__, stem=DIFFUSERS_STEM)
        write_json_atomic(aside / "config.json", settings)
    return out


def _to_llamagen_gpt(folder: Path, out: Path) -> Path:
    """A `.pt` file that LlamaGen's transformers load."""
    _write_file(out, "model", llamagen_state(folder))
    return out


EXPORTERS: dict[str, Callable[[Path, Path], Path]] = {
    "taming": _to_taming, "diffusers-vq": _to_diffusers, "llamagen-vq": _to_llamagen,
    "llamagen-gpt": _to_llamagen_gpt, "float16": to_float16}
"""Kind -> its exporter: (our folder, path to write) -> path written."""


def _on_meta(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in state.items()}


def _write_file(out: Path, container: str, state: Mapping[str, Tensor]) -> None:
    """Write `{container: state}`, or a flat safetensors file: whole or not at all."""
    with naming_path(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp{out.suffix}")
        try:
            if out.suffix == ".safetensors":
                write_tensors(aside, _on_meta(state), state.__getitem__)
            else:
                _torch_save({container: state}, aside, out)
            sync_path(aside)
            os.replace(aside, out)
        finally:
            aside.unlink(missing_ok=True)


def _torch_save(payload: Mapping[str, Any], aside: Path, out: Path) -> None:
    # an OSError with its reason for a path that cannot be written; torch.save raises a RuntimeError
    aside.touch()
    try:
        torch.save(payload, aside)
    except RuntimeError as error:  # its zip writer reports a failed write so
        raise RunFailedError(f"{out}: cannot be written; is the disk full? "
                             f"({one_line(error)[:120]})") from None
