"""Read the parts of our own folders for an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from inference.memory.meta_device import build_on_meta
from tokenloom_common.pretrained import PretrainedModule
from tokenloom_common.weights import check_tensors, read_tensors, shapes_of


def read_checked(model_class: type[PretrainedModule], config: Any, folder: Path
                 ) -> dict[str, Tensor]:
    """The tensors of a part's folder, as on disk. UserError unless they fit the config."""
    tensors = read_tensors(folder)
    # on the meta device: an export only copies values from file to file
    expected = build_on_meta(model_class, config).state_dict()
    check_tensors(shapes_of(expected), shapes_of(tensors), folder)
    return tensors
