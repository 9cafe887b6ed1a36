"""safetensors files written tensor after tensor, so that a model larger than memory can be written.

The library writes a file from tensors that are all there at once. The format: 8 bytes of the header's length, the header as
JSON (name -> dtype, shape, where its bytes begin and end), the bytes of each tensor (https://huggingface.co/docs/safetensors).
The library also puts the bytes wherever the header ends. Here all but a few small tensors begin at a multiple of ALIGNMENT, so
that they can be used where they lie when the file is mapped.
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
"""Bytes: where torch puts tensors of its own. At other addresses kernels may round differently, or be slower."""
MAX_SHARD_SIZE = "5GB"
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64",
          torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}


def write_shards(folder: Path, shapes: Mapping[str, Tensor], make: Callable[[str], Tensor],
                 max_shard_size: str = MAX_SHARD_SIZE, stem: str = "model") -> None:
    """STEM.safetensors, or shards and their index, into an existing folder.

    shapes: every tensor on the meta device, in its type. make: gives a tensor by name; one is held at a time.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    plan = split_state_dict_into_shards_factory(
        dict(shapes), get_storage_size=_size, get_storage_id=lambda tensor: None,
        filename_pattern=stem + "{suffix}.safetensors", max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        write_tensors(folder / file, {name: shapes[name] for name in names}, make)
    if plan.is_sharded:
        write_json_atomic(folder / INDEX_NAME.replace("model", stem, 1),
                          {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def write_tensors(path: Path, shapes: Mapping[str, Tensor], make: Callable[[str], Tensor]) -> None:
    """One safetensors file."""
    # what is no multiple of the alignment comes last, wide types first: it moves none of the others
    order = sorted(shapes, key=lambda name: (_size(shapes[name]) % ALIGNMENT != 0, -shapes[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + _size(shapes[name])
        header[name] = {"dtype": _TYPES[shapes[name].dtype], "shape": list(shapes[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = make(name).detach().cpu().contiguous()
            assert (tensor.shape, tensor.dtype) == (shapes[name].shape, shapes[name].dtype), name
            if tensor.numel():
                file.write(tensor.flatten().view(torch.uint8).numpy().data)


def _size(tensor: Tensor) -> int:
    """Bytes of what a tensor shows, whatever it is a view of."""
    return tensor.numel() * tensor.element_size()
