"""tokenizer_image/quantizers: residual, FSQ, LFQ, SimVQ and Gumbel against values worked out by hand."""

import math

import numpy as np
import pytest
import torch
from vector_quantize_pytorch import ResidualVQ

from tests.small_quantizers import (
    RAW_SEARCH,
    LargestTensor,
    as_map,
    as_rows,
    brute_force,
    latents_for,
    make,
    set_codes,
    started,
    total_loss,
)
from tokenizer_image import VQGANConfig, preset
from tokenizer_image.fingerprint import code_fingerprint
from tokenizer_image.quantizer_config import QuantizerConfig
from tokenizer_image.quantizers import Quantizer, build_quantizer, search
from tokenizer_image.quantizers.gumbel import gumbel_softmax
from tokenizer_image.quantizers.residual import ResidualQuantizer
from tokenizer_image.quantizers.simvq import SimVQuantizer
from tokenizer_image.vqgan import VQGAN

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
