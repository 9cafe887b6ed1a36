"""Images, models and features for the tests of the evaluations: made from seeds, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageDraw, ImageFilter
from scipy.linalg import sqrtm
from torch import nn

from tests import tiny
from tests.bad_images import corrupt_png
from tokenizer_image import VQGAN, VQGANConfig
from training.evaluation.image_metrics import inception
from training.evaluation.image_metrics.features import FeatureExtractor

SIDE = 32  # the smallest whole number of code cells that AlexNet's 31 pixels fit in
TINY_FEATURES = 12
ROWS = 20  # readable pictures of `generator_folders`


def disc(seed: int, side: int = 64) -> Image.Image:
    """A dark disc somewhere on a light ground."""
    draw = numpy.random.default_rng(seed)
    image = Image.new("RGB", (side, side), tuple(draw.integers(180, 256, 3).tolist()))
    x, y, r = draw.uniform(0.35, 0.65) * side, draw.uniform(0.35, 0.65) * side, draw.uniform(0.15, 0.3) * side
    ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), fill=tuple(draw.integers(0, 120, 3).tolist()))
    return image


def stripes(seed: int, side: int = 64) -> Image.Image:
    """Slanted stripes in two colours."""
    draw = numpy.random.default_rng(seed)
    y, x = numpy.mgrid[:side, :side]
    on = ((x * draw.uniform(0.5, 1) + y * draw.uniform(0.5, 1)) // draw.integers(2, 5)) % 2 == 0
    colours = draw.integers(0, 256, (2, 3))
    return Image.fromarray(numpy.where(on[..., None], *colours).astype(numpy.uint8))


def noise(seed: int, side: int = 64) -> Image.Image:
    return Image.fromarray(numpy.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=numpy.uint8))


def stack(images: list[Image.Image]) -> torch.Tensor:
    """uint8 [B, S, S, 3]."""
    return torch.from_numpy(numpy.stack([numpy.asarray(image) for image in images]))


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Structured and random pictures, each beside a changed one."""
    draw = numpy.random.default_rng(5)
    originals = [disc(0), stripes(1), noise(2), disc(3), Image.new("RGB", (64, 64), "white"), stripes(4), disc(5)]
    rough = numpy.asarray(originals[3]).astype(int) + draw.integers(-40, 41, (64, 64, 3))
    others = [originals[0].filter(ImageFilter.GaussianBlur(2)), originals[1].transpose(Image.Transpose.ROTATE_90), noise(3),
              Image.fromarray(rough.clip(0, 255).astype(numpy.uint8)), Image.new("RGB", (64, 64), "black"),
              Image.fromarray(255 - numpy.asarray(originals[5])), disc(6)]
    return stack(originals), stack(others)


def tokenizer(resolution: int = SIDE) -> VQGAN:
    """32 px, 8 x 8 codes of 64, codebook filled from random pictures."""
    torch.manual_seed(0)
    model = VQGAN(VQGANConfig(resolution=resolution, channels=8, channel_multipliers=(1, 2, 2), num_res_blocks=1, norm_groups=4,
                              attention_resolutions=(), mid_attention=False, z_channels=8, embed_dim=4, codebook_size=64))
    with torch.no_grad():
        model.train()(torch.rand(16, 3, resolution, resolution) * 2 - 1)
    return model.eval()


class TinyNetwork(nn.Module):
    """Mean colour of four quarters: 12 features."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.scale * nn.functional.adaptive_avg_pool2d(image, 2).flatten(1)


def tiny_extractor(name: str = "tiny", weights_hash: str = "0" * 64) -> FeatureExtractor:
    return FeatureExtractor(name, "Tiny-FD", TINY_FEATURES, weights_hash, 8, True, TinyNetwork())


def report_in(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def gaussian(seed: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    draw = numpy.random.default_rng(seed)
    factor = draw.normal(size=(size, size + 2))
    return torch.from_numpy(draw.normal(size=size)), torch.from_numpy(factor @ factor.T / size)


def scipy_distance(m1, c1, m2, c2) -> float:
    """The formula as it is printed, with SciPy's matrix square root of the product."""
    root = numpy.real(sqrtm(c1.numpy() @ c2.numpy()))
    return float(((m1 - m2) ** 2).sum() + c1.trace() + c2.trace() - 2 * numpy.trace(root))


def inception_state() -> dict[str, torch.Tensor]:
    """Random weights with the published names: the published ones cannot be fetched here."""
    torch.manual_seed(0)
    state = inception.InceptionV3().state_dict()
    return state | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


class Colours(nn.Module):
    """Mean colour of four quarters: 12 features."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.scale * nn.functional.adaptive_avg_pool2d(image, 2).flatten(1) + 2


def colour_extractor() -> FeatureExtractor:
    return FeatureExtractor("tiny", "Tiny-FD", 12, "0" * 64, 8, True, Colours())


def generator_folders(root: Path) -> dict[str, Path]:
    """model; matcher; data: 20 pictures, each with two captions, and one that is damaged; file: somebody's."""
    data = root / "data"
    data.mkdir()
    for number, picture in enumerate(tiny.pictures(ROWS, 20)):
        picture.save(data / f"{number:02}.png")
        (data / f"{number:02}.txt").write_text(f"{tiny.CAPTIONS[number % 15]}\n{tiny.CAPTIONS[number % 15 + 20]}")
    (data / "20.png").write_bytes(corrupt_png())
    (data / "20.txt").write_text("broken")
    (root / "file").write_text("somebody's")
    return {"model": tiny.model_folder(root / "model"), "matcher": tiny.matcher_folder(root / "matcher"), "data": data,
            "file": root / "file", "root": root}
