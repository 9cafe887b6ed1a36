"""Tell the kind of a published checkpoint from its file names and tensor names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from inference.checkpoints.files.msgpack_file import read_msgpack
from inference.checkpoints.files.weights_file import SUFFIXES, find_weights, tensor_names
from inference.checkpoints.formats.min_dalle import SIZES
from inference.checkpoints.formats.vqgan_jax import FLAX_WEIGHTS_NAME
from inference.conversions import is_ours
from inference.model_folder import INDEX_NAME
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import UserError

_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model", "last", "consolidated")


def detect(source: Path) -> str:
    """The kind of a checkpoint. UserError that asks for it if the names fit none or several."""
    if (source / INDEX_NAME).is_file() or is_ours(source):
        raise UserError(f"{source}: is a Tokenloom folder already; tokenloom export KIND {source} "
                        "OUT is the way back")

    kinds = _kinds_of_folder(source) if source.is_dir() else _kinds_of_file(source)
    if len(kinds) == 1:
        return kinds.pop()
    if kinds:  # a folder may hold several models: asking is safer than an order of preference
        problem = f"could be {' or '.join(sorted(kinds))}"
    else:
        problem = "is no checkpoint whose kind can be told from its names"
    raise UserError(f"{source}: {problem}; say which with tokenloom convert KIND {source} OUT "
                    "(--help lists the kinds)")


def _kinds_of_folder(folder: Path) -> set[str]:
    """Kinds whose typical files are there; else the kind of the weights file in the folder."""
    kinds = set()
    if (folder / FLAX_WEIGHTS_NAME).is_file():
        kinds |= _kinds_of_flax(folder / FLAX_WEIGHTS_NAME)
    if _has_min_dalle(folder):
        kinds.add("min-dalle")
    kinds |= _kinds_by_configs(folder)
    if kinds:
        return kinds

    # a run of taming holds several checkpoints, of which its converter takes the last
    if any((folder / "checkpoints").glob("*.ckpt")):
        return {"taming"}
    weights = [path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file()]
    if not weights:
        return set()
    if len(weights) == 1:
        return _kinds_of_file(weights[0])
    return _kinds_by_tensors(tensor_names(find_weights(folder, _STEMS, "a checkpoint")))


def _kinds_by_configs(folder: Path) -> set[str]:
    kinds = set()
    # a pipeline of diffusers keeps its VQModel in a subfolder; vae/ is mostly another class
    for place in (folder, folder / "vqvae", folder / "movq"):
        if (place / "config.json").is_file():
            config = read_mapping(place / "config.json")
            if config.get("_class_name") == "VQModel":
                kinds.add("diffusers-vq")
            # transformers' Janus and DeepSeek's
            if str(config.get("model_type", "")).startswith(("janus", "multi_modality")):
                kinds.add("janus-vq")
    return kinds


def _has_min_dalle(folder: Path) -> bool:
    places = [folder, *(folder / size for size in SIZES)]
    names = ("encoder.pt", "encoder_mini.pt")
    return any((place / name).is_file() for place in places for name in names)


def _kinds_of_flax(path: Path) -> set[str]:
    names = read_msgpack(path)
    if any(".decoder.layers." in name for name in names):  # a VQGAN's decoder has mid and up
        return {"dalle-mini"}
    if any("quantize.embedding" in name for name in names):
        return {"vqgan-jax"}
    return set()


def _kinds_of_file(path: Path) -> set[str]:
    if path.suffix == ".msgpack":
        return _kinds_of_flax(path)
    return _kinds_by_tensors(tensor_names(path))


def _kinds_by_tensors(names: Iterable[str]) -> set[str]:
    """Kinds with a tensor name that no other kind has."""
    all_names = list(names)
    kinds = set()

    def has(*parts: str) -> bool:
        """Whether one name holds all of the parts."""
        return any(all(part in name for part in parts) for name in all_names)

    if has("layers.0.attention.wqkv.weight") and has("cls_embedding."):
        kinds.add("llamagen-gpt")

    # first: below these prefixes a whole Janus has the names of LlamaGen or of taming
    if has("gen_vision_model.") or has("vqmodel."):
        kinds.add("janus-vq")
    elif has("encoder.conv_blocks.0.", "res.0.conv1"):
        kinds.add("llamagen-vq")
    elif has("encoder.down_blocks.0.resnets.0.conv1") and has("quantize.embedding"):
        kinds.add("diffusers-vq")
    elif has("encoder.down.0.block.0.conv1") and (
            has("quantize.embedding") or has("quantize.embed.")):  # the latter is GumbelVQ's
        # the decoder's finest level never has an upsampling: taming numbers it 0, transformers'
        # Janus last
        kinds.add("janus-vq" if has("decoder.up.0.upsample.") else "taming")
    return kinds
