"""Our image tokenizers and transformers as other projects' files: the way back, bit-exact.

What another project's code cannot express is refused by the field's name, never approximated.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

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
from inference.memory.meta_device import build_on_meta
from inference.model_folder import INDEX_NAME as MODEL_INDEX
from inference.model_folder import PARTS
from tokenizer_image import VQGAN, VQGANConfig
from tokenloom_common.errors import RunFailedError, UserError, choose, one_line
from tokenloom_common.files import (
    atomic_folder,
    naming,
    sync_path,
    write_json_atomic,
    write_text_atomic,
)
from tokenloom_common.pretrained import check_tensors, read_config, read_tensors, resolve_folder
from tokenloom_common.tensor_writer import write_shards, write_tensors

DIFFUSERS_VERSION = "0.42.1"  # that these files were loaded with
USED_CODES = 65_536  # a statistic of LlamaGen's training, which its strict loading wants to find
_BOOK = "quantizer.vq._codebook.embed"


def export_checkpoint(kind: str, folder: str | Path, out: str | Path) -> Path:
    """Write one of our folders as another project's checkpoint -> what was written.

    kind: a name in EXPORTS. folder: of an image tokenizer or a transformer, or a whole model folder. out: a file that does not
    exist (a folder for diffusers-vq). UserError naming the field that the other project's code cannot express.
    """
    exporter = choose(EXPORTS, kind, "kind of checkpoint to export")
    path = Path(out)
    if path.exists():
        raise UserError(f"{path}: exists already; give another name, nothing is overwritten")
    return exporter(resolve_folder(folder), path)


def _stored(folder: Path) -> tuple[VQGANConfig, dict[str, Tensor], Path]:
    """Config and tensors, as they are on disk, of a VQGAN's folder or of the one in a model folder."""
    place = folder / PARTS[0] if (folder / MODEL_INDEX).is_file() else folder
    config = read_config(place, VQGAN.kind, VQGANConfig)
    tensors = read_tensors(place)
    wanted = {name: tuple(tensor.shape) for name, tensor in build_on_meta(VQGAN, config).state_dict().items()}
    check_tensors(wanted, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, place)
    return config, tensors, place


def _refuse(config: VQGANConfig, project: str, where: Path, **wanted: Any) -> None:
    """UserError for the first field that is not what the other project's code has. A set holds several values that are fine."""
    if not config.has_encoder:
        raise UserError(f"{where}: has no encoder (has_encoder False), and {project}'s files have one; it cannot be exported")
    plain: dict[str, Any] = {"norm_groups": NORM_GROUPS, "norm_eps": 1e-6, "input_range": "signed", "output_range": "signed",
                             "decoder_channels": {None, config.channels},
                             "decoder_res_blocks": {None, config.num_res_blocks}, **wanted}
    for name, value in plain.items():
        owner: Any = config.quantizer if name.startswith("quantizer.") else config
        found = getattr(owner, name.removeprefix("quantizer."))
        if found not in (value if isinstance(value, set) else {value}):
            shown = value if not isinstance(value, set) else " or ".join(sorted(map(str, value - {None})))
            raise UserError(f"{where}: {project} cannot express {name} {found!r}, only {shown!r}; try another kind")


def _plain_names(tensors: Mapping[str, Tensor], config: VQGANConfig, naming: Naming) -> dict[str, Tensor]:
    """Everything outside the quantizer under another project's names."""
    levels = len(config.channel_multipliers)
    return {naming(name, levels): tensors[name] for name in tensor_names(VQGAN, config) if not name.startswith("quantizer.")}


def _to_taming(folder: Path, out: Path) -> Path:
    """OUT.ckpt or OUT.safetensors, and the yaml beside it."""
    config, tensors, place = _stored(folder)
    gumbel = config.quantizer.kind == "gumbel"
    _refuse(config, "taming-transformers", place, mid_attention=True,
            **{"quantizer.kind": {"vq", "gumbel"}, **({} if gumbel else {"quantizer.l2_normalize": False})})
    state = _plain_names(tensors, config, taming_name)
    if gumbel:
        state |= {f"quantize.{part}": tensors[f"quantizer.{part}"] for part in ("proj.weight", "proj.bias", "embed.weight")}
    else:
        state[CODEBOOK] = tensors[_BOOK][0]
        if not config.quantizer.learn_codebook_by_gradient:
            for part in ("cluster_size", "embed_avg"):
                state[f"quantize.embedding.{part}"] = tensors[f"quantizer.vq._codebook.{part}"][0]
    beside = out.with_suffix(".yaml")
    if beside.exists():
        raise UserError(f"{beside}: exists already, and the yaml is written beside {out.name}; give another name")
    _write_file(out, {"state_dict": state}, state, (".ckpt", ".pt", ".safetensors"))
    write_text_atomic(beside, yaml.safe_dump(_taming_yaml(config), sort_keys=False))
    return out


def _taming_yaml(config: VQGANConfig) -> dict[str, Any]:
    """The model section of taming's config, without its loss."""
    quantizer = config.quantizer
    target = {"gumbel": "GumbelVQ"}.get(quantizer.kind, "VQModel" if quantizer.learn_codebook_by_gradient else "EMAVQ")
    return {"model": {"target": f"taming.models.vqgan.{target}", "params": {
        "embed_dim": config.embed_dim, "n_embed": config.codebook_size, "ddconfig": {
            "double_z": False, "z_channels": config.z_channels, "resolution": config.resolution,
            "in_channels": config.in_channels, "out_ch": config.in_channels, "ch": config.channels,
            "ch_mult": list(config.channel_multipliers), "num_res_blocks": config.num_res_blocks,
            "attn_resolutions": list(config.attention_resolutions), "dropout": config.dropout},
        "lossconfig": {"target": "taming.modules.losses.vqperceptual.DummyLoss"}}}}


def _to_llamagen(folder: Path, out: Path) -> Path:
    """A `.pt` file that LlamaGen's VQ models load."""
    config, tensors, place = _stored(folder)
    _refuse(config, "LlamaGen", place, mid_attention=True, attention_resolutions=(config.level_resolutions[-1],),
            **{"quantizer.kind": "vq", "quantizer.l2_normalize": True, "quantizer.raw_search": False})
    state = {**_plain_names(tensors, config, llamagen_name), CODEBOOK: tensors[_BOOK][0],
             "quantize.codebook_used": torch.zeros(USED_CODES)}
    _write_file(out, {"model": state}, state, (".pt", ".pth", ".safetensors"))
    return out


def _to_diffusers(folder: Path, out: Path) -> Path:
    """The folder that `VQModel.from_pretrained` loads. Codes of unit length are written as they are compared."""
    config, tensors, place = _stored(folder)
    _refuse(config, "diffusers", place, norm_groups=config.norm_groups,
            **{"quantizer.kind": "vq", "quantizer.raw_search": False})
    if config.channel_multipliers[0] != 1:
        raise UserError(f"{place}: diffusers cannot express channel_multipliers {config.channel_multipliers}, only ones that "
                        "begin with 1; export it as another kind")
    levels = len(config.channel_multipliers)
    state = {diffusers_name(name, levels): as_linear(name, tensors[name]) for name in tensor_names(VQGAN, config)
             if not name.startswith("quantizer.")}
    book = tensors[_BOOK][0]
    unit = config.quantizer.l2_normalize
    state[CODEBOOK] = torch.nn.functional.normalize(book.float(), dim=1).to(book.dtype) if unit else book
    with atomic_folder(out, ()) as aside:
        write_shards(aside, {name: tensor.to("meta") for name, tensor in state.items()}, state.__getitem__, stem=DIFFUSERS_STEM)
        write_json_atomic(aside / "config.json", {
            "_class_name": "VQModel", "_diffusers_version": DIFFUSERS_VERSION, "act_fn": "silu", **diffusers_config(config),
            "norm_type": "group", "lookup_from_codebook": True, "sample_size": config.resolution})
    return out


def _to_llamagen_gpt(folder: Path, out: Path) -> Path:
    """A `.pt` file that LlamaGen's transformers load."""
    from inference.checkpoints.export_llamagen_gpt import llamagen_state

    state = llamagen_state(folder)
    _write_file(out, {"model": state}, state, (".pt", ".pth", ".safetensors"))
    return out


DIFFUSERS_STEM = "diffusion_pytorch_model"
EXPORTS: dict[str, Callable[[Path, Path], Path]] = {
    "taming": _to_taming, "diffusers-vq": _to_diffusers, "llamagen-vq": _to_llamagen,
    "llamagen-gpt": _to_llamagen_gpt}
"""Kind -> (our folder, what to write) -> what was written."""


def _write_file(out: Path, payload: Mapping[str, Any], state: Mapping[str, Tensor], endings: tuple[str, ...]) -> None:
    """One file, whole or not at all."""
    if out.suffix not in endings:
        raise UserError(f"{out}: give a file that ends in {', '.join(endings)}")
    with naming(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _write_aside(out, payload, state)


def _write_aside(out: Path, payload: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    aside = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp{out.suffix}")
    try:
        if out.suffix == ".safetensors":
            write_tensors(aside, {name: tensor.to("meta") for name, tensor in state.items()}, state.__getitem__)
        else:
            aside.touch()  # a path that cannot be written to is an OSError, which torch.save makes something else of
            try:
                torch.save(payload, aside)
            except RuntimeError as error:
                what = one_line(error)[:120]
                raise RunFailedError(f"{out}: cannot be written; is the disk full? ({what})") from None
        sync_path(aside)
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)
