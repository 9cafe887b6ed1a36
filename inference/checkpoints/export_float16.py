"""Write one of our folders with its weights rounded to 16 bits: half the size on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from inference.model_folder import INDEX_NAME as MODEL_INDEX
from inference.model_folder import PARTS
from tokenizer_image import load_tokenizer
from tokenizer_image.fingerprint import code_fingerprint
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import UserError
from tokenloom_common.files import atomic_folder, write_json_atomic
from tokenloom_common.tensor_writer import INDEX_NAME as SHARDS_INDEX
from tokenloom_common.tensor_writer import write_shards
from tokenloom_common.weights import read_tensors

CONFIG_NAME = "config.json"
FINGERPRINT = "tokenizer_fingerprint"


def to_float16(folder: Path, out: Path) -> Path:
    """Write `folder`, a whole model or one of its parts, to `out` in float16.

    Loading casts back to float32, with the rounded values. A model's transformer is tied to its
    image tokenizer by a fingerprint of the weights, which becomes that of the rounded tokenizer:
    token shards of the original are refused, since a code in some hundred may differ.
    UserError for a folder that is neither.
    """
    is_model = (folder / MODEL_INDEX).is_file()
    if not is_model and not (folder / CONFIG_NAME).is_file():
        raise UserError(f"{folder}: holds neither {MODEL_INDEX} nor {CONFIG_NAME}; give a model "
                        "folder, or the folder of one of its parts")

    with atomic_folder(out, ()) as aside:
        _round_weights(folder, aside)
        if is_model:
            for part in PARTS:
                (aside / part).mkdir()
                _round_weights(folder / part, aside / part)
            _renew_fingerprint(aside)
    return out


def _round_weights(folder: Path, aside: Path) -> None:
    """Write the files of one part, its tensors in float16."""
    _copy_texts(folder, aside)
    if not any(folder.glob("*.safetensors")):  # a text tokenizer, or the folder of a whole model
        return
    tensors = {name: _rounded(tensor) for name, tensor in read_tensors(folder).items()}
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    write_shards(aside, shapes, tensors.__getitem__)


def _copy_texts(folder: Path, aside: Path) -> None:
    for path in folder.iterdir():
        is_weights = path.suffix == ".safetensors" or path.name == SHARDS_INDEX
        if path.is_file() and not is_weights:
            shutil.copyfile(path, aside / path.name)


def _rounded(tensor: Tensor) -> Tensor:
    """Return the tensor in float16; as it is if it holds integers, or values beyond float16."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        return tensor
    half = tensor.to(torch.float16)
    # such as a quantizer's counts of codes, which training goes on from
    overflows = bool(half.isinf().any()) and not bool(tensor.isinf().any())
    return tensor if overflows else half


def _renew_fingerprint(folder: Path) -> None:
    """Tie the transformer to the rounded image tokenizer."""
    path = folder / "seq2seq" / CONFIG_NAME
    config = read_mapping(path)
    if config.get(FINGERPRINT):
        tokenizer = load_tokenizer(folder / "tokenizer_image")
        write_json_atomic(path, {**config, FINGERPRINT: code_fingerprint(tokenizer)})
