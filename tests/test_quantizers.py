"""tokenizer_image/quantizers: every kind against brute force, NumPy and values worked out by hand.

Axes: B batch, h w latent grid, D length of a code vector, K codebook size, n latents of a batch (= B*h*w).
"""

import copy
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode
from vector_quantize_pytorch import ResidualVQ

from tokenizer_image import VQGANConfig, preset
from tokenizer_image.fingerprint import code_fingerprint
from tokenizer_image.quantizer_config import READ_BY_KIND, QuantizerConfig
from tokenizer_image.quantizers import QUANTIZERS, Quantized, Quantizer, build_quantizer, search
from tokenizer_image.quantizers.gumbel import gumbel_softmax
from tokenizer_image.quantizers.residual import ResidualQuantizer
from tokenizer_image.quantizers.simvq import SimVQuantizer
from tokenizer_image.quantizers.vector import VectorQuantizer
from tokenizer_image.vqgan import VQGAN
from tokenloom_common.errors import UserError

RAW_SEARCH = {"raw_search": True, "learn_codebook_by_gradient": True, "kmeans_init": False, "dead_code_fraction": 0.0}
CASES: dict[str, tuple[int, int, dict]] = {  # D, K, options
    "vq": (4, 32, {}),
    "vq-euclidean": (4, 32, {"l2_normalize": False}),
    "vq-gradient": (4, 32, {"learn_codebook_by_gradient": True}),
    "vq-gradient-euclidean": (4, 32, {"learn_codebook_by_gradient": True, "l2_normalize": False}),
    "residual": (4, 16, {"kind": "residual", "depth": 3}),
    "residual-gradient": (4, 16, {"kind": "residual", "depth": 2, "learn_codebook_by_gradient": True}),
    "fsq": (3, 60, {"kind": "fsq", "levels": (3, 4, 5)}),
    "lfq": (4, 16, {"kind": "lfq"}),
    "lfq-spherical": (5, 32, {"kind": "lfq", "spherical": True}),
    "simvq": (4, 32, {"kind": "simvq"}),
    "raw-search": (4, 32, RAW_SEARCH),
    "gumbel": (4, 32, {"kind": "gumbel"}),
}
LEARNED = [name for name in CASES if name.startswith(("vq", "residual"))]
SEARCHED = [*LEARNED, "simvq", "raw-search", "gumbel"]


def make(case: str, **changes) -> Quantizer:
    dim, size, options = CASES[case]
    torch.manual_seed(0)
    return build_quantizer(dim, size, QuantizerConfig(**{**options, **changes}))


def latents_for(quantizer: Quantizer, batch: int = 4, side: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, quantizer.dim, side, side, generator=torch.Generator().manual_seed(seed))


def started(case: str, **changes) -> Quantizer:
    """After two training batches, in eval mode."""
    quantizer = make(case, **changes).train()
    for seed in (11, 12):
        quantizer(latents_for(quantizer, seed=seed))
    return quantizer.eval()


def set_codes(quantizer: VectorQuantizer, values: list[list[float]]) -> None:
    book = quantizer.vq._codebook
    book.embed.data[0] = torch.tensor(values)
    book.embed_avg[0] = torch.tensor(values)
    book.initted.fill_(True)


def as_map(rows: list[list[float]]) -> torch.Tensor:
    """Latents [n, D] as one picture [1, D, 1, n]."""
    return torch.tensor(rows).T[None, :, None].contiguous()


def as_rows(latents: torch.Tensor) -> np.ndarray:
    """[B, D, h, w] -> [n, D]."""
    return latents.detach().double().permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).numpy()


def brute_force(quantizer: Quantizer, latents: torch.Tensor) -> np.ndarray:
    """The nearest code of each latent in float64, the lowest of several; [n, depth]."""
    if quantizer.config.kind == "gumbel":
        weight, bias = (tensor.detach().double().numpy() for tensor in (quantizer.proj.weight[:, :, 0, 0], quantizer.proj.bias))
        return (as_rows(latents) @ weight.T + bias).argmax(axis=1)[:, None]
    layers = list(quantizer.layers) if isinstance(quantizer, ResidualQuantizer) else [quantizer]
    left, codes = as_rows(latents), []
    for layer in layers:
        raw = layer.config.raw_search
        book = (layer.vq.codebook if raw else layer.codebook).detach().double().numpy()
        on_sphere = layer.config.kind == "vq" and layer.config.l2_normalize and not raw
        z = left / np.linalg.norm(left, axis=1, keepdims=True) if on_sphere else left
        codes.append(((z[:, None] - book[None]) ** 2).sum(axis=2).argmin(axis=1))
        left = left - book[codes[-1]]
    return np.stack(codes, axis=1)


def total_loss(result: Quantized) -> torch.Tensor:
    return sum((part.value * part.weight for part in result.losses.values()), torch.zeros(()))


def test_every_kind_is_here():
    assert set(READ_BY_KIND) == set(QUANTIZERS) == {QuantizerConfig(**options).kind for _, _, options in CASES.values()}


# ---- search


@pytest.mark.parametrize("at_once", [None, 1, 13, 100, 5000])
@pytest.mark.parametrize("case", [*SEARCHED, "lfq", "lfq-spherical"])
def test_nearest_is_brute_force_in_blocks_of_any_size(case, at_once, monkeypatch):
    quantizer = started(case)
    if at_once:
        monkeypatch.setattr(search, "MAX_SCORES_PER_BLOCK", at_once)
    latents = latents_for(quantizer, batch=2, side=5)
    expected = brute_force(quantizer, latents)
    codes = quantizer.nearest(latents)
    assert codes.dtype == torch.int64
    assert codes.shape == (2, 5, 5 * expected.shape[1])
    assert np.array_equal(codes.reshape(-1, expected.shape[1]), expected)
    assert len(np.unique(expected)) > 8
    assert torch.equal(quantizer(latents).codes, codes)


@pytest.mark.parametrize("at_once", [None, 1, 3, 7, 64, 300])
@pytest.mark.parametrize("case", ["vq", "vq-euclidean", "simvq"])
def test_ties_go_to_the_lowest_code_in_blocks_of_any_size(case, at_once, monkeypatch):
    """Small whole numbers, of which every distance is exact, so that the ties are."""
    rng = np.random.default_rng(0)
    if case == "vq":  # unit vectors along the axes, each twice or more
        values = np.concatenate([np.eye(4), -np.eye(4)])[rng.integers(0, 8, size=32)]
    else:
        values = rng.integers(-1, 2, size=(8, 4))[rng.integers(0, 8, size=32)]
    quantizer = make(case)
    if isinstance(quantizer, SimVQuantizer):
        quantizer.frozen.copy_(torch.from_numpy(values))
        quantizer.map.weight.data = torch.eye(4)
    else:
        set_codes(quantizer, values.tolist())
    if at_once:
        monkeypatch.setattr(search, "MAX_SCORES_PER_BLOCK", at_once)
    z = rng.integers(-2, 3, size=(40, 4))
    distances = -(z @ values.T) if case == "vq" else ((z[:, None] - values[None]) ** 2).sum(axis=2)
    assert ((distances == distances.min(axis=1, keepdims=True)).sum(axis=1) > 1).mean() > 0.5  # ties are the rule
    codes = quantizer.nearest(as_map(z.astype(np.float32).tolist()))
    assert np.array_equal(codes.flatten(), distances.argmin(axis=1))


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operation gives."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("case", SEARCHED)
def test_memory_of_a_search_does_not_grow_with_the_codebook(case, monkeypatch):
    at_once = 1 << 14
    monkeypatch.setattr(search, "MAX_SCORES_PER_BLOCK", at_once)
    options = {**({"kmeans_init": False} if case in LEARNED else {}), **CASES[case][2]}
    for size in (1024, 8192):
        quantizer = build_quantizer(2, size, QuantizerConfig(**options)).eval()
        latents = latents_for(quantizer, batch=8, side=12)  # n * K is up to 576 times what is allowed
        with LargestTensor() as measured:
            quantizer.nearest(latents)
        assert at_once / 2 < measured.largest <= at_once


@pytest.mark.parametrize("case", CASES)
def test_lookup_gives_the_vectors_of_the_forward(case):
    quantizer = started(case)
    latents = latents_for(quantizer)
    result = quantizer(latents)
    assert torch.equal(result.codes, quantizer.nearest(latents))
    vectors = quantizer.lookup(result.codes)
    assert vectors.dtype == torch.float32
    assert vectors.shape == latents.shape
    torch.testing.assert_close(result.vectors, vectors, rtol=1e-4, atol=1e-5)
    with_gradients = quantizer(latents.clone().requires_grad_())
    torch.testing.assert_close(with_gradients.vectors, vectors, rtol=1e-4, atol=1e-5)
    if quantizer.config.kind != "residual":
        assert torch.equal(quantizer.codebook[result.codes].permute(0, 3, 1, 2), vectors)
    assert quantizer.codebook.shape == (CASES[case][1] * quantizer.config.depth, quantizer.dim)
    assert quantizer.nearest(latents[:0]).shape == (0, *result.codes.shape[1:])


@pytest.mark.parametrize("case", CASES)
def test_training_takes_the_nearest_of_the_codebook_that_was_there(case):
    quantizer = started(case)
    before = copy.deepcopy(quantizer)
    latents = latents_for(quantizer, seed=2)
    result = quantizer.train()(latents)
    assert torch.equal(result.codes, before.nearest(latents))
    if case != "gumbel":  # which decodes a sample
        torch.testing.assert_close(result.vectors, before.lookup(result.codes), rtol=1e-4, atol=1e-5)
    if case in ("vq", "vq-euclidean", "residual"):
        assert not torch.equal(quantizer.codebook, before.codebook)


@pytest.mark.parametrize("case", CASES)
def test_only_a_training_forward_changes_anything(case):
    quantizer = started(case)
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    latents = latents_for(quantizer, seed=2)
    quantizer(latents)
    quantizer.train().nearest(latents)
    quantizer.lookup(quantizer.nearest(latents))
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())
    assert quantizer.rewritten == make(case).rewritten == [] or case in LEARNED
    other = copy.deepcopy(quantizer)
    other.train()(latents)
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())


@pytest.mark.parametrize("case", [case for case in CASES if case != "gumbel"])
def test_training_and_eval_have_the_same_losses_and_gradients(case):
    quantizer = started(case)
    outcomes = []
    for training in (False, True):
        latents = latents_for(quantizer, seed=2).requires_grad_()
        result = copy.deepcopy(quantizer).train(training)(latents)
        (result.vectors * torch.arange(result.vectors.numel()).view_as(result.vectors).cos()).sum().add(
            total_loss(result)).backward()
        outcomes.append({"gradient": latents.grad, **{name: part.value for name, part in result.losses.items()}})
    assert outcomes[0].keys() == outcomes[1].keys()
    for name in outcomes[0]:
        torch.testing.assert_close(outcomes[0][name], outcomes[1][name], rtol=1e-4, atol=1e-5)


# ---- gradients through a quantizer


@pytest.mark.parametrize("case", ["vq-euclidean", "vq-gradient-euclidean", "residual", "residual-gradient", "lfq", "simvq"])
@pytest.mark.parametrize("training", [True, False])
def test_straight_through_copies_the_gradient_once(case, training):
    quantizer = started(case, **({} if case == "lfq" else {"rotation_trick": False})).train(training)
    latents = latents_for(quantizer).requires_grad_()
    weights = torch.randn(latents.shape)
    (quantizer(latents).vectors * weights).sum().backward()
    torch.testing.assert_close(latents.grad, weights)


@pytest.mark.parametrize("case", ["vq-gradient", "vq-gradient-euclidean", "residual-gradient", "simvq"])
@pytest.mark.parametrize("rotation_trick", [True, False])
def test_the_picture_moves_latents_and_only_the_codebook_term_moves_codes(case, rotation_trick):
    quantizer = started(case, rotation_trick=rotation_trick).train()
    latents = latents_for(quantizer)
    assert not quantizer(latents).vectors.requires_grad
    result = quantizer(latents.requires_grad_())
    result.vectors.square().sum().backward(retain_graph=True)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in quantizer.parameters())
    result.losses["commit"].value.backward(retain_graph=True)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in quantizer.parameters())
    result.losses["codebook"].value.backward()
    assert all(parameter.grad.any() for parameter in quantizer.parameters())


def test_rotation_turns_the_gradient_by_hand():
    """From (2, 0) to (0, 3): a quarter turn and 1.5 times as long."""
    quantizer = make("vq-euclidean")
    quantizer = VectorQuantizer(2, 2, quantizer.config)
    set_codes(quantizer, [[0.0, 3.0], [-9.0, -9.0]])
    latents = as_map([[2.0, 0.0]]).requires_grad_()
    result = quantizer.eval()(latents)
    assert result.vectors.flatten().tolist() == pytest.approx([0.0, 3.0], abs=1e-5)
    (result.vectors * as_map([[10.0, 20.0]])).sum().backward()
    assert latents.grad.flatten().tolist() == pytest.approx([1.5 * 20, -1.5 * 10], rel=1e-5)


# ---- residual


@pytest.mark.parametrize("depth", [2, 4])
def test_residual_equals_the_library_with_the_same_codebooks(depth):
    ours = started("residual", depth=depth)
    theirs = ResidualVQ(dim=4, num_quantizers=depth, codebook_size=16).eval()  # its forward of pictures fails in 1.32.0
    for mine, layer in zip(ours.layers, theirs.layers, strict=True):
        layer._codebook.embed.data.copy_(mine.vq._codebook.embed)
    latents = latents_for(ours, seed=3)
    quantized, indices, _ = theirs(latents.flatten(2).mT)  # [B, h*w, D], [B, h*w, depth]
    codes = ours.nearest(latents)
    assert torch.equal(codes, indices.reshape(4, 8, 8 * depth))
    torch.testing.assert_close(ours.lookup(codes), quantized.mT.reshape(latents.shape))
    assert indices.unique().numel() == 16


def test_residual_codes_of_a_position_follow_one_another_by_hand():
    quantizer = ResidualQuantizer(2, 3, QuantizerConfig(kind="residual", depth=2, kmeans_init=False)).eval()
    set_codes(quantizer.layers[0], [[0.0, 0.0], [10.0, 0.0], [20.0, 0.0]])
    set_codes(quantizer.layers[1], [[0.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    latents = as_map([[10.0, 1.0], [0.0, -1.0], [20.0, 0.2]])
    assert quantizer.nearest(latents).tolist() == [[[1, 1, 0, 2, 2, 0]]]
    assert quantizer.lookup(torch.tensor([[[2, 1, 0, 2]]]))[0, :, 0].T.tolist() == [[20.0, 1.0], [0.0, -1.0]]
    commit = quantizer(latents).losses["commit"].value  # depth 1: 1, 1 and 0.04 over 6 numbers; depth 2: 0.04
    assert commit.item() == pytest.approx((2.04 / 6 + 0.04 / 6) / 2)
    assert quantizer.codebook.shape == (6, 2)


# ---- fsq


def test_fsq_by_hand():
    """Odd levels: round(tanh(z) 1.001 (L-1)/2); even ones are shifted by half a level, so that 0 stays 0 (the paper's code)."""
    quantizer = build_quantizer(2, 12, QuantizerConfig(kind="fsq", levels=(3, 4))).eval()
    latents = as_map([[0.0, 0.0], [1.0, 5.0], [-0.5, -5.0], [-9.0, -1.0]])
    result = quantizer(latents)
    assert result.vectors[0, :, 0].T.tolist() == [[0.0, 0.0], [1.0, 0.5], [0.0, -1.0], [-1.0, -0.5]]
    # level numbers (1, 2), (2, 3), (1, 0), (0, 1); the first counts 1, the second 3
    assert result.codes.tolist() == [[[7, 11, 1, 3]]]
    assert result.losses == {}
    assert quantizer.codebook[[7, 11, 1, 3]].tolist() == [[0.0, 0.0], [1.0, 0.5], [0.0, -1.0], [-1.0, -0.5]]


def test_fsq_reaches_every_code():
    quantizer = build_quantizer(4, 3 * 4 * 5 * 8, QuantizerConfig(kind="fsq", levels=(3, 4, 5, 8)))
    book = quantizer.codebook
    levels = torch.tensor([3, 4, 5, 8])
    assert book.unique(dim=0).shape == (480, 4)
    half, offset = (levels - 1) * 1.001 / 2, torch.where(levels % 2 == 0, 0.5, 0.0)
    latents = torch.atanh((book * (levels // 2) + offset) / half) - torch.atanh(offset / half)
    assert torch.equal(quantizer.nearest(as_map(latents.tolist())).flatten(), torch.arange(480))
    wide = torch.randn(1, 4, 200, 200, generator=torch.Generator().manual_seed(0)) * 2
    assert quantizer.nearest(wide).unique().numel() == 480


def test_fsq_codes_are_exact_where_float32_is_not():
    quantizer = build_quantizer(5, 64**5, QuantizerConfig(kind="fsq", levels=(64,) * 5))
    codes = torch.tensor([[[64**5 - 1, 64**5 - 2, 2**24 + 1]]])
    vectors = quantizer.lookup(codes)
    latents = torch.atanh((vectors * 32 + 0.5) / 31.5315) - math.atanh(0.5 / 31.5315)
    assert torch.equal(quantizer.nearest(latents), codes)
    assert torch.equal(quantizer(latents).codes, codes)


# ---- lfq


def test_lfq_codes_are_signs_by_hand():
    quantizer = build_quantizer(3, 8, QuantizerConfig(kind="lfq"))
    latents = as_map([[0.1, -5.0, 2.0], [-1.0, -1.0, -1.0], [3.0, 0.0, -0.1], [1.0, 1.0, 1.0]])
    assert quantizer.nearest(latents).tolist() == [[[5, 0, 4, 7]]]
    assert quantizer.lookup(torch.tensor([[[5, 0]]]))[0, :, 0].T.tolist() == [[1.0, -1.0, 1.0], [-1.0, -1.0, -1.0]]


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_lfq_losses_are_numpys(spherical, dim, temperature):
    config = QuantizerConfig(kind="lfq", spherical=spherical, entropy_temperature=temperature, entropy_weight=0.3,
                             diversity_gamma=2.0, commitment_weight=0.5)
    quantizer = build_quantizer(dim, 2**dim, config).train()
    latents = latents_for(quantizer) * 0.2
    z = as_rows(latents)
    if spherical:
        z = z / np.linalg.norm(z, axis=1, keepdims=True)
    book = np.array([[1.0 if code >> (dim - 1 - bit) & 1 else -1.0 for bit in range(dim)] for code in range(2**dim)])
    book /= math.sqrt(dim) if spherical else 1.0
    np.testing.assert_allclose(quantizer.codebook, book, rtol=1e-6)
    scores = -((z[:, None] - book[None]) ** 2).sum(axis=2) / temperature
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)

    def entropy(p: np.ndarray) -> np.ndarray:
        return -(p * np.log(np.maximum(p, 1e-300))).sum(axis=-1)

    losses = quantizer(latents).losses
    assert {name: part.weight for name, part in losses.items()} == {
        "commit": 0.5, "sample_entropy": 0.3, "batch_entropy": -0.6}
    assert losses["sample_entropy"].value.item() == pytest.approx(entropy(shares).mean(), rel=1e-4, abs=1e-6)
    assert losses["batch_entropy"].value.item() == pytest.approx(entropy(shares.mean(axis=0)), rel=1e-4, abs=1e-6)
    chosen = book[scores.argmax(axis=1)]
    assert losses["commit"].value.item() == pytest.approx(((z - chosen) ** 2).mean(), rel=1e-5)


def test_lfq_batch_entropy_of_a_large_codebook():
    """All codes alike: log K, with a gradient; the library stops at log 100,000 and has none. In little memory."""
    quantizer = build_quantizer(18, 2**18, QuantizerConfig(kind="lfq")).train()
    latents = torch.zeros(1, 18, 8, 8, requires_grad=True)
    with LargestTensor() as measured:
        entropy = quantizer(latents).losses["batch_entropy"].value
    assert entropy.item() == pytest.approx(18 * math.log(2), rel=1e-5)
    assert measured.largest <= 2**18
    latents = (torch.randn(1, 18, 8, 8, generator=torch.Generator().manual_seed(0)) * 1e-3).requires_grad_()
    quantizer(latents).losses["batch_entropy"].value.backward()
    assert latents.grad.abs().min() > 0


def test_spherical_lfq_has_length_1():
    quantizer = make("lfq-spherical")
    assert torch.allclose(quantizer.codebook.norm(dim=1), torch.ones(32))
    latents = latents_for(quantizer).requires_grad_()
    assert torch.allclose(quantizer(latents).vectors.norm(dim=1), torch.ones(4, 8, 8))
    torch.testing.assert_close(quantizer(latents).losses, quantizer(latents * 7).losses)


# ---- simvq


def test_simvq_moves_the_whole_codebook_when_one_code_is_used():
    quantizer = make("simvq").train()
    assert [name for name, _ in quantizer.named_parameters()] == ["map.weight"]
    torch.testing.assert_close(quantizer.codebook, quantizer.frozen @ quantizer.map.weight.T)
    before, frozen = quantizer.codebook.detach().clone(), quantizer.frozen.clone()
    latents = (before[5] + 0.01).detach().view(1, 4, 1, 1)
    result = quantizer(latents)
    assert result.codes.item() == 5
    total_loss(result).backward()
    torch.optim.SGD(quantizer.parameters(), lr=1.0).step()
    assert ((quantizer.codebook - before).norm(dim=1) > 0).all()
    assert torch.equal(quantizer.frozen, frozen)


def test_simvq_loss_by_hand():
    quantizer = SimVQuantizer(2, 2, QuantizerConfig(kind="simvq", commitment_weight=0.5))
    quantizer.frozen.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    quantizer.map.weight.data = torch.tensor([[2.0, 0.0], [0.0, 4.0]])  # codes (2, 0) and (0, 4)
    latents = as_map([[1.0, 0.0]]).requires_grad_()
    losses = quantizer(latents).losses
    assert {name: (part.value.item(), part.weight) for name, part in losses.items()} == {
        "commit": (0.5, 0.5), "codebook": (0.5, 1.0)}
    total_loss(quantizer(latents)).backward()
    assert latents.grad.flatten().tolist() == [-0.5, 0.0]  # commit alone: 0.5 * (1 - 2)
    assert quantizer.map.weight.grad.tolist() == [[1.0, 0.0], [0.0, 0.0]]  # codebook alone: (2 - 1) * frozen (1, 0)


# ---- codebooks learned by gradient


def test_codebook_by_gradient_on_the_sphere_by_hand():
    config = QuantizerConfig(learn_codebook_by_gradient=True, kmeans_init=False, dead_code_fraction=0, commitment_weight=0.25)
    quantizer = VectorQuantizer(2, 2, config).train()
    set_codes(quantizer, [[3.0, 0.0], [0.0, 5.0]])
    assert isinstance(quantizer.vq._codebook.embed, torch.nn.Parameter)
    assert quantizer.codebook.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert quantizer.lookup(torch.tensor([[[1]]])).flatten().tolist() == [0.0, 1.0]
    latents = as_map([[1.2, 1.6]]).requires_grad_()  # (0.6, 0.8) on the circle
    result = quantizer(latents)
    assert result.codes.item() == 1
    assert result.vectors.flatten().tolist() == pytest.approx([0.0, 1.0], abs=1e-6)
    assert result.losses["commit"].value.item() == pytest.approx((0.36 + 0.04) / 2)
    assert result.losses["codebook"].value.item() == pytest.approx((0.36 + 0.04) / 2)
    assert {name: part.weight for name, part in result.losses.items()} == {"commit": 0.25, "codebook": 1.0}
    total_loss(result).backward()
    gradient = quantizer.vq._codebook.embed.grad[0]
    assert gradient[0].tolist() == [0.0, 0.0]
    assert gradient[1].tolist() == pytest.approx([-0.6 / 5, 0.0], abs=1e-6)  # (e - z) across e, over e's length
    # 0.25 (z - e) = (0.15, -0.05) across z = (0.6, 0.8), over the latent's length 2
    along = 0.15 * 0.6 - 0.05 * 0.8
    assert latents.grad.flatten().tolist() == pytest.approx([(0.15 - along * 0.6) / 2, (-0.05 - along * 0.8) / 2], abs=1e-6)


@pytest.mark.parametrize("case", ["vq-gradient", "vq-gradient-euclidean", "residual-gradient", "simvq"])
def test_commitment_weight_0_leaves_the_codebook_learning(case):
    quantizer = started(case, commitment_weight=0.0).train()
    latents = latents_for(quantizer).requires_grad_()
    total_loss(quantizer(latents)).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in quantizer.parameters())
    assert latents.grad is None or not latents.grad.any()


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("fsq", "gumbel")])
def test_commitment_weight_scales_one_term_only(case):
    weights = []
    for weight in (0.0, 0.5):
        quantizer = make(case, commitment_weight=weight).train()
        weights.append({name: part.weight for name, part in quantizer(latents_for(quantizer)).losses.items()})
    assert weights[0] == {**weights[1], "commit": 0.0}
    assert weights[1]["commit"] == 0.5


@pytest.mark.parametrize("case", ["vq-gradient", "residual-gradient"])
def test_codebooks_that_kmeans_and_restarts_rewrote_are_named_once(case):
    quantizer = make(case, dead_code_fraction=0.0).train()
    quantizer(latents_for(quantizer))
    assert [id(p) for p in quantizer.rewritten] == [id(p) for p in quantizer.parameters()]
    quantizer.rewritten = []
    quantizer(latents_for(quantizer))
    assert quantizer.rewritten == []
    quantizer = make(case, dead_code_fraction=0.9, ema_decay=0.0).train()
    quantizer(latents_for(quantizer))
    quantizer.rewritten, quantizer.restarts = [], 0
    for seed in range(3):
        quantizer(latents_for(quantizer, batch=1, seed=seed))  # restarts at each step
    assert quantizer.restarts > 10
    assert [id(p) for p in quantizer.rewritten] == [id(p) for p in quantizer.parameters()]
    following = make(case.removesuffix("-gradient"), dead_code_fraction=0.9, ema_decay=0.0).train()
    following(latents_for(following))
    assert following.rewritten == []  # buffers are nobody's parameters


@pytest.mark.parametrize("case", ["vq-gradient", "vq-gradient-euclidean"])
def test_gradients_are_those_of_the_codes_before_they_restarted(case):
    restarting = started(case, dead_code_fraction=0.9, ema_decay=0.5).train()
    staying = make(case, dead_code_fraction=0.0).train()
    staying.load_state_dict(restarting.state_dict())
    restarting.restarts = 0
    for quantizer in (restarting, staying):
        total_loss(quantizer(latents_for(quantizer, seed=7))).backward()
    assert restarting.restarts > 2
    assert not torch.equal(restarting.codebook, staying.codebook)
    torch.testing.assert_close(restarting.vq._codebook.embed.grad, staying.vq._codebook.embed.grad)


# ---- codebooks that follow their latents


def test_moving_average_of_one_step_by_hand():
    config = QuantizerConfig(l2_normalize=False, ema_decay=0.75, kmeans_init=False, dead_code_fraction=0)
    quantizer = VectorQuantizer(1, 3, config).train()
    set_codes(quantizer, [[0.0], [10.0], [99.0]])
    result = quantizer(as_map([[1.0], [2.0], [3.0], [8.0]]))
    assert result.codes.tolist() == [[[0, 0, 0, 1]]]
    book = quantizer.vq._codebook
    assert book.cluster_size[0].tolist() == [0.75 + 0.25 * 3, 0.75 + 0.25, 0.75]
    assert book.embed_avg[0, :, 0].tolist() == [0.25 * 6, 0.75 * 10 + 0.25 * 8, 0.75 * 99]
    assert quantizer.codebook[:, 0].tolist() == pytest.approx([1.5 / 1.5, 9.5, 99.0])
    assert result.losses["commit"].value.item() == pytest.approx((1 + 4 + 9 + 4) / 4)  # to the codes before
    assert "codebook" not in result.losses


def test_moving_average_on_the_sphere_by_hand():
    quantizer = VectorQuantizer(2, 2, QuantizerConfig(ema_decay=0.5, kmeans_init=False, dead_code_fraction=0)).train()
    set_codes(quantizer, [[1.0, 0.0], [0.0, 1.0]])
    quantizer(as_map([[8.0, 6.0], [0.3, 0.4]]))  # (0.8, 0.6) and (0.6, 0.8): one for each code
    expected = torch.tensor([[1.8, 0.6], [0.6, 1.8]])
    torch.testing.assert_close(quantizer.codebook, expected / expected.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("l2_normalize", [True, False])
def test_a_code_out_of_use_stays_where_it_is(l2_normalize):
    config = QuantizerConfig(l2_normalize=l2_normalize, ema_decay=0.5, kmeans_init=False, dead_code_fraction=0)
    quantizer = VectorQuantizer(2, 2, config).train()
    set_codes(quantizer, [[1.0, 0.0], [-0.6, -0.8]])
    for _ in range(200):
        quantizer(as_map([[1.0, 0.1]]))
    torch.testing.assert_close(quantizer.codebook[1], torch.tensor([-0.6, -0.8]))
    quantizer(as_map([[-1.0, 0.0]]))  # and comes back into use
    torch.testing.assert_close(quantizer.codebook[1], torch.tensor([-1.0, 0.0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", LEARNED)
def test_kmeans_of_fewer_latents_than_codes_leaves_no_code_at_0(case):
    quantizer = make(case, dead_code_fraction=0.0).train()
    latents = latents_for(quantizer, batch=1, side=3)
    quantizer(latents)
    assert quantizer.codebook[:CASES[case][1]].norm(dim=1).min() > 0.1
    if quantizer.config.kind == "vq":
        chosen = torch.as_tensor(as_rows(quantizer.lookup(quantizer.nearest(latents))))
        target = torch.as_tensor(as_rows(latents))
        target = target / target.norm(dim=1, keepdim=True) if quantizer.config.l2_normalize else target
        torch.testing.assert_close(chosen, target, rtol=1e-4, atol=1e-4)  # every latent has its own code


def test_kmeans_finds_separate_clusters():
    config = QuantizerConfig(l2_normalize=False, dead_code_fraction=0, ema_decay=0.5)
    torch.manual_seed(4)
    quantizer = VectorQuantizer(1, 2, config).train()
    quantizer(as_map([[0.0], [1.0], [10.0], [11.0], [12.0]]))
    assert sorted(quantizer.codebook[:, 0].tolist()) == pytest.approx([0.5, 11.0])


@pytest.mark.parametrize("case", ["vq", "vq-euclidean", "vq-gradient", "vq-gradient-euclidean"])
def test_dead_codes_restart_at_latents_and_are_counted(case):
    """mean use 16/8 = 2 latents, so codes with under 1 are dead: the five that are far from every latent."""
    config = QuantizerConfig(**CASES[case][2], ema_decay=0.0, dead_code_fraction=0.5, kmeans_init=False)
    quantizer = VectorQuantizer(2, 8, config).train()
    angles = torch.tensor([0.0, 0.1, 0.2, 3.0, 3.1, 3.2, 3.3, 3.4])
    set_codes(quantizer, torch.stack([angles.cos(), angles.sin()], dim=1).tolist())
    around = torch.linspace(-0.05, 0.25, 16)
    latents = torch.stack([around.cos(), around.sin()], dim=1)
    quantizer(as_map(latents.tolist()))
    assert quantizer.restarts == 5
    away = torch.cdist(quantizer.codebook[3:], latents).min(dim=1).values
    assert away.max() < 1e-3
    assert quantizer.codebook[3:].unique(dim=0).shape == (5, 2)
    quantizer(as_map(latents.tolist()))
    assert quantizer.restarts - 5 <= 3  # the new ones are in use; it adds up


@pytest.mark.parametrize("case", LEARNED)
def test_no_more_codes_restart_than_there_are_latents(case):
    quantizer = make(case, ema_decay=0.0, dead_code_fraction=0.5, kmeans_init=False).train()
    quantizer(latents_for(quantizer, batch=1, side=2))  # 4 latents, at least 12 dead codes
    assert quantizer.restarts == 4 * quantizer.config.depth
    assert all(layer.restarts == 0 for layer in getattr(quantizer, "layers", []))


def test_codes_in_use_are_not_restarted_at_the_first_step():
    """The averages start at 1; a share of the mean use of 100 would call codes dead that a large batch uses evenly."""
    quantizer = VectorQuantizer(1, 4, QuantizerConfig(l2_normalize=False, kmeans_init=False)).train()
    set_codes(quantizer, [[0.0], [1.0], [2.0], [3.0]])
    rows = [[float(code)] for code in range(4) for _ in range(100)]
    for _ in range(3):
        quantizer(as_map(rows))
    assert quantizer.restarts == 0
    for _ in range(1500):
        quantizer(as_map(rows[:10]))  # until the other three are below 0.03 of the mean use
        if quantizer.restarts:
            break
    assert quantizer.restarts == 3


def test_a_restarted_code_gets_time_to_be_found():
    """It starts with the mean use, so that it is under half of it after 7 steps out of use, not after one."""
    config = QuantizerConfig(l2_normalize=False, kmeans_init=False, ema_decay=0.9, dead_code_fraction=0.5)
    quantizer = VectorQuantizer(1, 2, config).train()
    set_codes(quantizer, [[0.0], [99.0]])
    same = as_map([[0.5]] * 8)  # code 0 takes them all, also from a code that was put on the same place
    restarts = []
    for _ in range(40):
        quantizer(same)
        restarts.append(quantizer.restarts)
        if quantizer.restarts:
            assert quantizer.codebook[1].item() == pytest.approx(0.5)  # and its average is that of its new place
        quantizer.vq._codebook.embed[0, 0] = 0.5
    steps = [step for step, count in enumerate(restarts) if count > (restarts[step - 1] if step else 0)]
    assert len(steps) > 3
    assert {later - earlier for earlier, later in itertools.pairwise(steps[1:])} == {7}  # while the mean rises, 8


# ---- precision and broken numbers


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_buffers_stay_float32_and_training_goes_on_in_another_dtype(case, dtype):
    options = {"dead_code_fraction": 0.9, "ema_decay": 0.5} if case in LEARNED else {}  # restarts at each step
    quantizer = started(case, **options).to(dtype).train()
    quantizer.restarts = 0
    for seed in (3, 4):
        latents = latents_for(quantizer, seed=seed).to(dtype).requires_grad_()
        result = quantizer(latents)
        assert result.vectors.dtype == dtype
        assert all(part.value.dtype == torch.float32 for part in result.losses.values())
        (result.vectors.float().sum() + total_loss(result)).backward()
        assert torch.isfinite(latents.grad).all()
    assert quantizer.restarts > 2 or case not in LEARNED
    assert quantizer.codebook.dtype == torch.float32
    assert quantizer.lookup(result.codes).dtype == torch.float32
    assert torch.equal(quantizer.eval()(latents).codes, quantizer.nearest(latents))
    assert all(buffer.dtype == torch.float32 for buffer in quantizer.buffers() if buffer.is_floating_point())
    assert all(parameter.dtype == dtype for parameter in quantizer.parameters())


@pytest.mark.parametrize("case", CASES)
def test_autocast_changes_nothing(case):
    quantizer = started(case)
    latents = latents_for(quantizer)
    codes, book, result = quantizer.nearest(latents), quantizer.codebook, quantizer(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.nearest(latents), codes)
        assert torch.equal(quantizer.codebook, book)
        assert torch.equal(quantizer.lookup(codes), quantizer.lookup(codes).float())
        again = quantizer(latents)
    assert torch.equal(again.vectors, result.vectors)
    assert all(torch.equal(part.value, again.losses[name].value) for name, part in result.losses.items())
    assert torch.equal(quantizer.lookup(codes), result.vectors) or case not in ("vq", "simvq")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("first_batch", [True, False])
def test_nan_in_a_latent_stays_in_its_vector(case, first_batch):
    options = {"dead_code_fraction": 0.5, "ema_decay": 0.5} if case in LEARNED else {}
    quantizer = make(case, **options) if first_batch else started(case, **options)
    latents = latents_for(quantizer)
    latents[0, :, 2, 3], latents[1, 0, 4, 4], latents[2, 1, 0, 0] = torch.nan, torch.nan, torch.inf
    latents.requires_grad_()
    result = quantizer.train()(latents)
    broken = ~torch.isfinite(result.vectors).all(dim=1)
    assert broken.nonzero().tolist() == [[0, 2, 3], [1, 4, 4], [2, 0, 0]]
    assert result.vectors[0, :, 2, 3].isnan().all()
    assert result.codes.min() >= 0
    assert result.codes.max() < quantizer.codebook_size
    assert all(torch.isfinite(part.value) for part in result.losses.values())
    (torch.where(torch.isfinite(result.vectors), result.vectors, 0).sum() + total_loss(result)).backward()
    assert torch.isfinite(latents.grad).all()
    for tensor in [*quantizer.state_dict().values(), *(parameter.grad for parameter in quantizer.parameters())]:
        assert torch.isfinite(tensor).all()
    codes = quantizer.eval().nearest(latents)
    assert torch.equal(quantizer(latents).codes, codes)
    assert codes.min() >= 0
    assert codes.max() < quantizer.codebook_size


@pytest.mark.parametrize("case", CASES)
def test_saved_and_loaded_quantizer_goes_on_identically(case):
    quantizer = started(case).train()
    with torch.device("meta"):  # as PretrainedModule compares shapes
        empty = make(case)
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == {
        name: tensor.shape for name, tensor in quantizer.state_dict().items()}
    again = make(case).train()
    again.load_state_dict({name: tensor.clone() for name, tensor in quantizer.state_dict().items()})
    latents = latents_for(quantizer, seed=5)
    results = []
    for model in (quantizer, again):
        torch.manual_seed(1)
        results.append(model(latents))
    assert torch.equal(results[0].codes, results[1].codes)
    assert torch.equal(results[0].vectors, results[1].vectors)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in quantizer.state_dict().items())


@pytest.mark.parametrize("kind", sorted(READ_BY_KIND))
def test_a_tokenizer_with_each_kind_trains_and_is_saved_and_loaded(kind, tmp_path):
    sizes = {"fsq": {"embed_dim": 3, "codebook_size": 60}, "lfq": {"embed_dim": 6, "codebook_size": 64}}.get(kind, {})
    options = {"kind": kind, **{"fsq": {"levels": [3, 4, 5]}, "residual": {"depth": 2}}.get(kind, {})}
    model = VQGAN(VQGANConfig.parse({**preset("debug").plain(), **sizes, "quantizer": options}, "test")).train()
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    result = model(image)
    assert result.codes.shape == (2, *model.grid)
    (result.reconstruction.square().mean() + sum(part.value * part.weight for part in result.losses.values())).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or (not p.grad.any() and ".k.bias" not in name)]
    model.eval().save_pretrained(tmp_path / "m")
    loaded = VQGAN.from_pretrained(tmp_path / "m")
    codes = model.encode(image)
    assert torch.equal(loaded.encode(image), codes)
    assert torch.equal(loaded.decode(codes), model.decode(codes))
    torch.testing.assert_close(model.decode(codes), model(image).reconstruction.clamp(-1, 1), rtol=1e-4, atol=1e-4)


# ---- search at the codes' own lengths


def raw_quantizer(rows: list[list[float]]) -> VectorQuantizer:
    quantizer = build_quantizer(len(rows[0]), len(rows), QuantizerConfig(**RAW_SEARCH))
    set_codes(quantizer, rows)
    return quantizer


def test_raw_search_compares_lengths_and_decodes_directions():
    quantizer = raw_quantizer([[3.0, 0.0], [0.6, 0.8], [0.0, -2.0]])
    latents = as_map([[1.5, 0.2], [2.5, 0.5]])  # by direction both are nearest to the first
    assert quantizer.nearest(latents).flatten().tolist() == [1, 0]
    without = build_quantizer(2, 3, QuantizerConfig(**{**RAW_SEARCH, "raw_search": False}))
    without.load_state_dict(quantizer.state_dict())
    assert without.nearest(latents).flatten().tolist() == [0, 0]
    expected = torch.tensor([[0.6, 0.8], [1.0, 0.0]])
    torch.testing.assert_close(quantizer.lookup(quantizer.nearest(latents))[0, :, 0].T, expected)
    assert torch.equal(quantizer.codebook, without.codebook)


def test_raw_search_is_that_of_janus_in_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.models.janus.modeling_janus import JanusVQVAEVectorQuantizer

    torch.manual_seed(0)
    theirs = JanusVQVAEVectorQuantizer(transformers.JanusVQVAEConfig(num_embeddings=64, embed_dim=4, num_patches=6))
    with torch.no_grad():
        theirs.embedding.weight.mul_(torch.rand(64, 1) * 2)
    ours = raw_quantizer(theirs.embedding.weight.tolist())
    latents = torch.randn(3, 4, 6, 6)
    codes = ours.nearest(latents)
    assert codes.flatten().tolist() == theirs(latents)[2].tolist()
    assert codes.flatten().tolist() != build_quantizer(4, 64, QuantizerConfig()).nearest(latents).flatten().tolist()
    torch.testing.assert_close(ours.lookup(codes), theirs.get_codebook_entry(codes.flatten(1)))


def test_raw_search_trains_on_the_codes_that_it_encodes():
    quantizer = make("raw-search").train()
    with torch.no_grad():
        quantizer.vq._codebook.embed.mul_(torch.linspace(0.2, 3, 32).view(1, 32, 1))
    latents = latents_for(quantizer).requires_grad_()
    result = quantizer(latents)
    assert torch.equal(result.codes, quantizer.nearest(latents))
    total_loss(result).backward()
    assert latents.grad.abs().sum() > 0
    used = torch.zeros(32, dtype=torch.bool).index_fill_(0, result.codes.flatten(), True)
    assert torch.equal(quantizer.vq._codebook.embed.grad[0].abs().sum(dim=1) > 0, used)  # the codes that were chosen


# ---- gumbel


def gumbel_by_hand() -> Quantizer:
    """Two codes; the logits of a latent [x, y] are 2x + 1 and y."""
    quantizer = build_quantizer(2, 2, QuantizerConfig(kind="gumbel", kl_weight=0.25))
    with torch.no_grad():
        quantizer.proj.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]])[:, :, None, None])
        quantizer.proj.bias.copy_(torch.tensor([1.0, 0.0]))
        quantizer.embed.weight.copy_(torch.tensor([[5.0, 6.0], [7.0, 8.0]]))
    return quantizer


def test_gumbel_takes_the_largest_logit_and_its_row():
    quantizer = gumbel_by_hand().eval()
    latents = as_map([[1.0, 2.0], [0.0, 2.0], [0.0, 1.0]])  # logits (3, 2), (1, 2), and a tie
    result = quantizer(latents)
    assert result.codes.flatten().tolist() == quantizer.nearest(latents).flatten().tolist() == [0, 1, 0]
    assert torch.equal(result.vectors, as_map([[5.0, 6.0], [7.0, 8.0], [5.0, 6.0]]))
    first = math.exp(3) / (math.exp(3) + math.exp(2))
    kl = [first * math.log(2 * first) + (1 - first) * math.log(2 * (1 - first))] * 2 + [0.0]  # the second is its mirror image
    assert result.losses["kl"].value.item() == pytest.approx(sum(kl) / 3, rel=1e-5)
    assert result.losses["kl"].weight == 0.25


@pytest.mark.parametrize("at_once", [None, 1, 3, 64])
def test_gumbel_ties_go_to_the_lowest_code_in_blocks_of_any_size(at_once, monkeypatch):
    quantizer = make("gumbel")
    with torch.no_grad():
        quantizer.proj.weight.copy_(torch.randint(-1, 2, quantizer.proj.weight.shape))
        quantizer.proj.bias.copy_(torch.randint(0, 2, (32,)))
    if at_once:
        monkeypatch.setattr(search, "MAX_SCORES_PER_BLOCK", at_once)
    latents = torch.randint(-2, 3, (2, 4, 5, 5)).float()
    assert np.array_equal(quantizer.nearest(latents).flatten(), brute_force(quantizer, latents)[:, 0])


def test_gumbel_training_decodes_samples_that_follow_the_logits():
    quantizer = gumbel_by_hand().train()
    latents = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).expand(1, 2, 100, 100)
    torch.manual_seed(0)
    vectors = quantizer(latents).vectors
    assert torch.cdist(as_tensor_rows(vectors), quantizer.codebook).min(dim=1).values.max() < 1e-4  # one code each
    share = (vectors[0, 0] < 6).float().mean().item()
    assert share == pytest.approx(math.exp(3) / (math.exp(3) + math.exp(2)), abs=0.015)
    soft = build_quantizer(2, 2, QuantizerConfig(kind="gumbel", straight_through=False)).train()
    soft.load_state_dict(quantizer.state_dict())
    between = soft(latents).vectors[0, 0]
    assert ((between > 5.05) & (between < 6.95)).float().mean() > 0.5


def as_tensor_rows(latents: torch.Tensor) -> torch.Tensor:
    return latents.detach().permute(0, 2, 3, 1).reshape(-1, latents.shape[1])


def test_a_straight_through_sample_has_the_gradient_of_the_soft_one():
    torch.manual_seed(0)
    logits, weights = torch.randn(2, 5, 3, 3), torch.randn(2, 5, 3, 3)
    gradients, samples = [], []
    for hard in (False, True):
        given = logits.clone().requires_grad_()
        torch.manual_seed(1)
        samples.append(gumbel_softmax(given, 0.7, hard))
        (samples[-1] * weights).sum().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients)
    assert torch.equal(samples[1], torch.zeros(2, 5, 3, 3).scatter_(1, samples[0].argmax(dim=1, keepdim=True), 1.0))


def test_the_temperature_of_gumbel_follows_the_step_through_the_tokenizer():
    options = {"kind": "gumbel", "temperature_start": 0.9, "temperature_end": 0.1, "temperature_steps": 100}
    model = VQGAN(VQGANConfig.parse({**preset("debug").plain(), "quantizer": options}, "test"))
    assert model.quantizer.temperature == 0.9
    assert model.set_step(50, 1000) == {"temperature": pytest.approx(0.5)}
    assert model.quantizer.temperature == pytest.approx(0.5)
    assert model.set_step(40, 40) == {"temperature": pytest.approx(0.1)}  # a short run ends at the end too
    assert VQGAN(preset("debug")).set_step(1, 2) == {}


@pytest.mark.parametrize(("options", "name"), [
    ({"kind": "gumbel"}, "proj.weight"), ({"kind": "gumbel"}, "proj.bias"), ({"kind": "gumbel"}, "embed.weight"),
    (RAW_SEARCH, "vq._codebook.embed")])
def test_the_fingerprint_holds_all_that_decides_a_code(options, name):
    model = VQGAN(VQGANConfig.parse({**preset("debug").plain(), "quantizer": options}, "test"))
    before = code_fingerprint(model)
    with torch.no_grad():
        model.quantizer.get_parameter(name).mul_(2)  # of a raw codebook the length alone
    assert code_fingerprint(model) != before


# ---- options

OTHER_VALUES = {  # a value that no base below has
    "l2_normalize": False, "commitment_weight": 2.0, "learn_codebook_by_gradient": True, "ema_decay": 0.5,
    "dead_code_fraction": 0.9, "kmeans_init": False, "kmeans_iterations": 1, "rotation_trick": False, "depth": 3,
    "levels": (5, 4, 3), "entropy_weight": 0.7, "diversity_gamma": 0.2, "entropy_temperature": 0.5, "spherical": True,
    "raw_search": True, "kl_weight": 0.3, "temperature_start": 2.0, "temperature_end": 0.5, "temperature_steps": 2,
    "straight_through": False}
BASES = {"vq": "vq", "residual": "residual", "fsq": "fsq", "lfq": "lfq", "simvq": "simvq", "gumbel": "gumbel"}


def outcome(kind: str, **changes) -> list[float]:
    """What three training steps on learned latents leave behind."""
    options = {**({"depth": 2} if kind == "residual" else {}), **changes}
    quantizer = make(BASES[kind], **options).train()
    latents = latents_for(quantizer, batch=8, side=4).requires_grad_()
    optimizer = torch.optim.SGD([latents, *quantizer.parameters()], lr=0.1)
    for step in range(3):
        quantizer.set_step(step, 3)
        result = quantizer(latents)
        optimizer.zero_grad()
        (total_loss(result) + (result.vectors * torch.arange(latents.numel()).view_as(latents).cos()).sum()).backward()
        optimizer.step()
    left = (result.vectors, latents, quantizer.codebook, total_loss(result))
    return [float(tensor.detach().double().sum()) for tensor in left]


@pytest.mark.parametrize(("kind", "option"), [
    (kind, option) for kind, names in READ_BY_KIND.items() for option in sorted(names)])
def test_each_option_that_a_kind_reads_changes_its_training(kind, option):
    needed = {name: value for name, value in RAW_SEARCH.items() if name != "raw_search"} if option == "raw_search" else {}
    assert outcome(kind, **needed) == outcome(kind, **needed)
    assert outcome(kind, **needed, **{option: OTHER_VALUES[option]}) != outcome(kind, **needed)


@pytest.mark.parametrize("kind", sorted(READ_BY_KIND))
def test_options_that_a_kind_does_not_read_are_refused(kind):
    options = set(QuantizerConfig.model_fields) - {"kind"}
    assert options == set(OTHER_VALUES) == set().union(*READ_BY_KIND.values())
    needed = {"fsq": {"levels": (3, 4, 5)}, "residual": {"depth": 2}}.get(kind, {})
    for option in options - READ_BY_KIND[kind]:
        with pytest.raises(UserError) as raised:
            QuantizerConfig.parse({"kind": kind, **needed, option: OTHER_VALUES[option]}, "config.json")
        readers = [other for other, names in READ_BY_KIND.items() if option in names]
        assert str(raised.value) == (f"config.json: kind '{kind}' does not read {option} "
                                     f"(kinds that do: {', '.join(readers)}); leave it out")
    QuantizerConfig.parse({**QuantizerConfig(kind=kind, **needed).plain()}, "config.json")  # defaults may be written out


@pytest.mark.parametrize(("values", "message"), [
    ({"kind": "vqq"}, "kind: .*got 'vqq'"),
    ({"kind": "fsq"}, r"kind 'fsq' needs levels, for example \[8, 5, 5, 5\]"),
    ({"kind": "fsq", "levels": [8, 2]}, "levels.1: .*greater than or equal to 3, got 2"),
    ({"kind": "fsq", "levels": [65]}, "levels.0: .*got 65"),
    ({"kind": "fsq", "levels": 8}, "levels: .*got 8"),
    ({"kind": "residual"}, "kind 'residual' with depth 1 is plain vq; use depth 2 or more"),
    ({"kind": "residual", "depth": 33}, "depth: .*got 33"),
    ({"depth": 2}, "kind 'vq' does not read depth"),
    ({"commitment_weight": -1.0}, "commitment_weight: .*got -1.0"),
    ({"commitment_weight": float("nan")}, "commitment_weight: .*got nan"),
    ({"ema_decay": 1.0}, "ema_decay: .*got 1.0"),
    ({"kind": "lfq", "entropy_temperature": 0}, "entropy_temperature: .*got 0"),
    ({"kmeans_iterations": 0}, "kmeans_iterations: .*got 0"),
    ({"raw_search": True}, "raw_search needs vectors that keep their own lengths.*set l2_normalize and learn_codebook_by_gr"),
    ({**RAW_SEARCH, "l2_normalize": False}, "raw_search needs vectors that keep their own lengths"),
    ({**RAW_SEARCH, "kmeans_init": True}, "raw_search compares lengths.*set kmeans_init false and dead_code_fraction 0"),
    ({**RAW_SEARCH, "dead_code_fraction": 0.1}, "raw_search compares lengths"),
    ({"raw_search": "some"}, "raw_search: .*got 'some'"),
    ({"kind": "gumbel", "temperature_end": 2.0}, "temperature_end 2.0 is above temperature_start 1.0"),
    ({"kind": "gumbel", "temperature_start": 0}, "temperature_start: .*got 0"),
    ({"kind": "gumbel", "temperature_steps": -1}, "temperature_steps: .*got -1"),
    ({"kind": "gumbel", "kl_weight": -1.0}, "kl_weight: .*got -1.0"),
    ({"kind": "gumbel", "straight_through": 2}, "straight_through: .*got 2"),
    ({"dept": 2}, "unknown key 'dept'; did you mean 'depth'")])
def test_impossible_options_are_refused_in_one_line(values, message):
    with pytest.raises(UserError, match=f"^here: {message}") as raised:
        QuantizerConfig.parse(values, "here")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("change", "message"), [
    ({"embed_dim": 4, "codebook_size": 60, "quantizer": {"kind": "fsq", "levels": [3, 4, 5]}},
     "quantizer.levels [3, 4, 5] give embed_dim 3 and codebook_size 60, got 4 and 60; set them to that"),
    ({"embed_dim": 3, "codebook_size": 64, "quantizer": {"kind": "fsq", "levels": [3, 4, 5]}},
     "quantizer.levels [3, 4, 5] give embed_dim 3 and codebook_size 60, got 3 and 64; set them to that"),
    ({"embed_dim": 6, "codebook_size": 32, "quantizer": {"kind": "lfq"}},
     "kind 'lfq' has 2^embed_dim codes: embed_dim 6 gives codebook_size 64, got 32; "
     "set embed_dim to log2 of the codebook_size that you want"),
    ({"embed_dim": 1}, "embed_dim 1 leaves two directions with quantizer.l2_normalize; use 8, or at least 2")])
def test_sizes_that_do_not_fit_are_refused_with_the_sizes_that_do(change, message):
    with pytest.raises(UserError) as raised:
        VQGANConfig.parse({**preset("debug").plain(), **change}, "config.json")
    assert str(raised.value) == f"config.json: {message}"


# ---- several processes

TWO = {
    "vq": {"dead_code_fraction": 0.9, "ema_decay": 0.5},  # many codes restarted at each step
    "vq-random": {"kmeans_init": False, "dead_code_fraction": 0},  # none, so that the random start stays
    "residual": {"kind": "residual", "depth": 2, "dead_code_fraction": 0.9, "ema_decay": 0.5},
    "gradient": {"learn_codebook_by_gradient": True, "dead_code_fraction": 0.9, "ema_decay": 0.5},
    "gradient-random": {"learn_codebook_by_gradient": True, "kmeans_init": False, "dead_code_fraction": 0},
    "lfq": {"kind": "lfq", "entropy_temperature": 1.0},
}


def _latents_of_rank(rank: int, step: int) -> torch.Tensor:
    return torch.randn(8, 6, 4, 4, generator=torch.Generator().manual_seed(10 * step + rank))


def _train_one_rank(rank: int, world: int, store: str, folder: str) -> None:
    warnings.simplefilter("error")  # a collective that autograd does not know warns
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(100 + rank)  # ranks differ in everything random, as in a careless launch
    for name, options in TWO.items():
        quantizer = build_quantizer(6, 64, QuantizerConfig(**options)).train()
        rewritten = []
        for step in range(4):
            latents = _latents_of_rank(rank, step).requires_grad_()
            result = quantizer(latents)
            total_loss(result).backward()
            for parameter in quantizer.parameters():
                torch.distributed.all_reduce(parameter.grad)
                parameter.data -= 0.1 * parameter.grad / world
                parameter.grad = None
            rewritten.append(len(quantizer.rewritten))
            quantizer.rewritten = []
        values = {part: loss.value.detach() for part, loss in result.losses.items()}
        torch.save({"state": quantizer.state_dict(), "restarts": quantizer.restarts, "rewritten": rewritten, "losses": values,
                    "gradient": latents.grad}, f"{folder}/{name}{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_keep_one_codebook(tmp_path):
    mp.spawn(_train_one_rank, args=(2, str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    saved = {name: [torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1)] for name in TWO}
    for name, (first, second) in saved.items():
        assert first["state"].keys() == second["state"].keys()
        assert all(torch.equal(first["state"][key], second["state"][key]) for key in first["state"]), name
        assert first["restarts"] == second["restarts"]
        assert first["rewritten"] == second["rewritten"]
        for key, tensor in first["state"].items():
            if key.endswith("_codebook.embed"):
                assert tensor[0].unique(dim=0).shape[0] > 56, name  # distinct codes, drawn from both ranks
            if key.endswith("initted"):
                assert tensor
    assert saved["vq"][0]["restarts"] > 10
    assert saved["residual"][0]["restarts"] > 10
    assert saved["gradient"][0]["restarts"] > 10
    assert saved["gradient"][0]["rewritten"][0] == 1  # k-means
    assert saved["gradient-random"][0]["rewritten"] == [1, 0, 0, 0]  # rank 1 took over rank 0's
    # lfq: the entropy of both batches together, and gradients whose mean over the ranks is its gradient
    latents = torch.cat([_latents_of_rank(rank, 3) for rank in (0, 1)]).requires_grad_()
    both = build_quantizer(6, 64, QuantizerConfig(**TWO["lfq"])).train()(latents)
    total_loss(both).backward()
    for rank, one in enumerate(saved["lfq"]):
        torch.testing.assert_close(one["losses"]["batch_entropy"], both.losses["batch_entropy"].value.detach())
        torch.testing.assert_close(one["gradient"] / 2, latents.grad[8 * rank:8 * rank + 8], rtol=1e-4, atol=1e-7)
