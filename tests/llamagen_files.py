"""Published files of a tiny LlamaGen, and the parts that a conversion needs beside them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from inference.checkpoints import ConvertOptions
from tests import tiny
from tests.llamagen_reference import Sizes, make_state

CLASSES = Sizes()
GROUPED = Sizes(heads=4, kv_heads=2)
CONTAINERS = {
    "ddp": lambda state: {"model": state, "optimizer": {"state": {}}, "steps": 7},
    "deepspeed": lambda state: {"module": state, "ds_version": "0.10"},
    "state_dict": lambda state: {"state_dict": state},
    "fsdp": lambda state: state,
    "wrapped": lambda state: {"model": {f"module.{name}": state[name] for name in state}},
    "compiled": lambda state: {"model": {f"_orig_mod.{name}": state[name] for name in state}},
    "fsdp-wrapped": lambda state: {
        name.replace("layers.", "layers._fsdp_wrapped_module."): state[name] for name in state},
    "with-buffers": lambda state: {"model": {
        **state, "freqs_cis": torch.ones(17, 4, 2), "causal_mask": torch.ones(2, 24, 24),
        "layers.0.attention.kv_cache.k_cache": torch.ones(3)}}}


def make_parts(folder: Path) -> Path:
    """Write vq/ (an image tokenizer of 32 codes in 4 x 4), t5/ (a text encoder), headsN.yaml."""
    tiny.vqgan().save_pretrained(folder / "vq")
    tiny.t5_folder(folder / "t5")
    for heads in (2, 4):
        (folder / f"heads{heads}.yaml").write_text(f"n_head: {heads}\n")
    return folder


def saved(path: Path, sizes: Sizes, container: str = "ddp", **changes: Tensor) -> dict[str, Tensor]:
    """Write a published file with random weights -> its tensors."""
    state = make_state(sizes) | changes
    torch.save(CONTAINERS[container](state), path)
    return state


def options(parts: Path, sizes: Sizes, **changes) -> ConvertOptions:
    given = {"config": parts / f"heads{sizes.heads}.yaml", "image_tokenizer": parts / "vq",
             "text_encoder": None if sizes.features is None else str(parts / "t5"), **changes}
    return ConvertOptions(**given)
