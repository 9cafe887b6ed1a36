"""Which kind of published checkpoint a file or folder is, where its names leave no doubt."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from inference.checkpoints.files.msgpack_file import read_msgpack
from inference.checkpoints.files.weights_file import SUFFIXES, find_weights, read_weights
from inference.checkpoints.formats.min_dalle import SIZES
from inference.checkpoints.formats.vqgan_jax import WEIGHTS_NAME
from inference.checkpoints.writing import is_ours
from inference.model_folder import INDEX_NAME
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import UserError

_WEIGHTS = ("model", "pytorch_model", "diffusion_pytorch_model", "last", "consolidated")


def detect(source: Path) -> str:
    """The kind of a checkpoint. UserError, asking for it, where files or names fit none or several."""
    if (source / INDEX_NAME).is_file() or is_ours(source):
        raise UserError(f"{source}: is a Tokenloom folder already; tokenloom export KIND {source} OUT is the way back")
    found = _folder_kinds(source) if source.is_dir() else _file_kinds(source)
    if len(found) == 1:
        return found.pop()
    what = f"could be {' or '.join(sorted(found))}" if found else "is no checkpoint whose kind can be told from its names"
    raise UserError(f"{source}: {what}; say which with tokenloom convert KIND {source} OUT (--help lists the kinds)")


def _folder_kinds(folder: Path) -> set[str]:
    found: set[str] = set()
    if (folder / WEIGHTS_NAME).is_file():
        found |= _flax_kinds(folder / WEIGHTS_NAME)
    if any((place / "encoder.pt").is_file() or (place / "encoder_mini.pt").is_file() for place in
           (folder, *(folder / size for size in SIZES))):
        found.add("min-dalle")
    for place in (folder, folder / "vqvae", folder / "movq"):
        if (place / "config.json").is_file():
            config = read_mapping(place / "config.json")
            if config.get("_class_name") == "VQModel":
                found.add("diffusers-vq")
            if str(config.get("model_type", "")).startswith(("janus", "multi_modality")):
                found.add("janus-vq")
    if found:
        return found
    if (folder / "checkpoints").is_dir() and any((folder / "checkpoints").glob("*.ckpt")):
        return {"taming"}
    held = [path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES and path.is_file()]
    if len(held) == 1:
        return _file_kinds(held[0])
    return _names_kinds(read_weights(find_weights(folder, _WEIGHTS, "a checkpoint"))) if held else set()


def _flax_kinds(path: Path) -> set[str]:
    names = read_msgpack(path)
    if any(".decoder.layers." in name for name in names):
        return {"dalle-mini"}
    return {"vqgan-jax"} if any("quantize.embedding" in name for name in names) else set()


def _file_kinds(path: Path) -> set[str]:
    if path.suffix == ".msgpack":
        return _flax_kinds(path)
    return _names_kinds(read_weights(path, ("ema", "state_dict", "model", "module")))


def _names_kinds(weights: Iterable[str]) -> set[str]:
    """By names that no other kind has."""
    names, found = set(weights), set()

    def some(*parts: str) -> bool:
        return any(all(part in name for part in parts) for name in names)

    if some("layers.0.attention.wqkv.weight") and some("cls_embedding."):
        found.add("llamagen-gpt")
    if some("gen_vision_model.") or some("vqmodel."):
        found.add("janus-vq")
    elif some("encoder.conv_blocks.0.", "res.0.conv1"):
        found.add("llamagen-vq")
    elif some("encoder.down_blocks.0.resnets.0.conv1") and some("quantize.embedding"):
        found.add("diffusers-vq")
    elif some("encoder.down.0.block.0.conv1") and (some("quantize.embedding") or some("quantize.embed.")):
        # the decoder's finest level never has an upsampling: taming numbers it 0, transformers' Janus last
        found.add("janus-vq" if some("decoder.up.0.upsample.") else "taming")
    return found
