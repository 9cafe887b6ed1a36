"""Write safetensors files one tensor at a time, so that a model larger than memory can be written.

The safetensors library writes a file from tensors that are all in memory. The format
(https://huggingface.co/docs/safetensors): 8 bytes with the header's length, the header as JSON
(name -> dtype, shape, first and last byte), the bytes of each tensor. The library also starts the
tensors wherever the header ends. Here all but a few small tensors begin at a multiple of ALIGNMENT,
so that they can be used in place when the file is mapped into memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tokenloom_common.files import write_json_atomic

INDEX_NAME = "model.safetensors.index.json"
ALIGNMENT = 64
"""Bytes, as torch allocates. At other addresses kernels may round differently, or be slower."""
MAX_SHARD_SIZE = "5GB"
_DTYPE_NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL"}


def write_shards(folder: Path, shapes: Mapping[str, Tensor], make: Callable[[str], Tensor],
                 max_shard_size: str = MAX_SHARD_SIZE, stem: str = "model") -> None:
    """Write STEM.safetensors, or shards and their index, into an existing folder.

    shapes: every tensor on the meta device, in its dtype. make: returns a tensor by name; one is in
    memory at a time.
    """
    # the Hub's own splitting, so that names and index are as every loader knows them
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        # no storage id: a tensor that is a view of another is written for itself
        dict(shapes), get_storage_size=_bytes, get_storage_id=lambda tensor: None,
        filename_pattern=stem + "{suffix}.safetensors", max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        write_tensors(folder / file, {name: shapes[name] for name in names}, make)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json_atomic(folder / INDEX_NAME.replace("model", stem, 1), index)


def write_tensors(path: Path, shapes: Mapping[str, Tensor], make: Callable[[str], Tensor]) -> None:
    """Write one safetensors file. shapes, make: see `write_shards`."""
    def place(name: str) -> tuple[bool, int, str]:
        # tensors of an uneven size come last, wide dtypes first: there they move no other tensor
        # off its alignment
        uneven = _bytes(shapes[name]) % ALIGNMENT != 0
        return uneven, -shapes[name].element_size(), name

    names = sorted(shapes, key=place)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses others
    end = 0
    for name in names:
        tensor = shapes[name]
        start, end = end, end + _bytes(tensor)  # counted from the end of the header
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [start, end]}

    text = json.dumps(header).encode()
    length_bytes = 8
    text += b" " * (-(length_bytes + len(text)) % ALIGNMENT)  # aligns the first tensor
    with path.open("wb") as file:
        file.write(len(text).to_bytes(length_bytes, "little") + text)
        for name in names:
            tensor = make(name).detach().cpu().contiguous()
            assert (tensor.shape, tensor.dtype) == (shapes[name].shape, shapes[name].dtype), name
            # as bytes: NumPy has no bfloat16
            file.write(tensor.flatten().view(torch.uint8).numpy().data)


def _bytes(tensor: Tensor) -> int:
    """Bytes of the values that a tensor shows, however large the storage that it is a view of."""
    return tensor.numel() * tensor.element_size()
