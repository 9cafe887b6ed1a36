"""tokenizer_image/quantizers: code search against brute force, ties, memory, and search by raw length."""

import numpy as np
import pytest
import torch

from tests.small_quantizers import (
    CASES,
    LEARNED,
    RAW_SEARCH,
    SEARCHED,
    LargestTensor,
    as_map,
    brute_force,
    latents_for,
    make,
    set_codes,
    started,
    total_loss,
)
from tokenizer_image.quantizer_config import QuantizerConfig
from tokenizer_image.quantizers import build_quantizer, search
from tokenizer_image.quantizers.simvq import SimVQuantizer
from tokenizer_image.quantizers.vector import VectorQuantizer

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


@pytest.mark.long
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
