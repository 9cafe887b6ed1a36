"""Jacobi decoding: the tokens, and so the distribution, of plain decoding, in fewer steps."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import scipy.stats
import torch

from inference.decoder.cached_decoder import CachedDecoder
from inference.generation.batch import Generation, Request
from inference.generation.jacobi import jacobi_steps
from inference.generation.ways import generate_tokens
from inference.sampling import SamplingParams, filtered_probabilities, guidance_at, guide
from seq2seq import TextBatch
from tests import tiny
from tests.decoder_shapes import SHAPES, build

PARAMS = {
    "plain": SamplingParams(guidance_scale=1.0, top_k=8),
    "guided": SamplingParams(guidance_scale=3.0, top_k=8, temperature=0.7),
    "greedy": SamplingParams(guidance_scale=2.0, temperature=0.0),
    "schedule": SamplingParams(guidance_scale=4.0, guidance_schedule="linear", top_p=0.9),
    "ends-early": SamplingParams(guidance_scale=4.0, guidance_end=0.4, min_p=0.02),
}


def request(shape: str, params: SamplingParams, window: int = 1, images: int = 2) -> tuple[CachedDecoder, Request]:
    """Two captions and a null caption of one of the shapes of test_decoder."""
    model, text, layout = build(shape)
    captions, null = (TextBatch(text.text_input[rows], text.text_mask[rows]) for rows in (slice(0, 2), slice(2, 3)))
    given = None if layout is None else layout[:1].expand(2 * images, -1)
    return CachedDecoder(model), Request(captions, null, images, params, list(range(2 * images)), given, window)


@pytest.mark.parametrize("window", [2, 5, 64])
@pytest.mark.parametrize("params", PARAMS)
def test_tokens_equal_plain_decoding(params, window):
    decoder, plain = request("encoder-decoder default", PARAMS[params])
    jacobi = dataclasses.replace(plain, window=window)
    assert torch.equal(generate_tokens(decoder, jacobi)[0], generate_tokens(decoder, plain)[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_equal_plain_decoding_in_every_family(shape):
    decoder, plain = request(shape, PARAMS["ends-early"])
    assert torch.equal(generate_tokens(decoder, dataclasses.replace(plain, window=4))[0], generate_tokens(decoder, plain)[0])


def test_a_sampled_layout_is_the_same_too():
    decoder, plain = request("encoder-decoder layout", PARAMS["guided"])
    plain = dataclasses.replace(plain, layout=None)
    (tokens, layout), (others, same) = (generate_tokens(decoder, dataclasses.replace(plain, window=w)) for w in (1, 6))
    assert torch.equal(layout, same)
    assert torch.equal(tokens, others)


def test_a_model_whose_tokens_do_not_depend_on_each_other_takes_a_step_a_window():
    model = tiny.seq2seq()
    with torch.no_grad():  # attention and feed-forward add nothing: logits do not depend on what came before
        for blocks in model.decoder.layers:
            for name, parameter in blocks[1].named_parameters():
                if "to_out" in name or "ff." in name:
                    parameter.zero_()
        model.image_embedding.weight.copy_(model.begin_of_image.expand_as(model.image_embedding.weight))
    text = tiny.text_tokenizer().encode(["octopus"])
    generation = Generation(CachedDecoder(model), Request(text, text, 1, PARAMS["plain"], [0], None, 4))
    list(jacobi_steps(generation))
    # a new position's first guess is wrong, its second is right: 1 token, then windows of 4 less what is new in them
    assert generation.forwards < 16 * 0.7


def test_it_takes_no_more_steps_than_plain_decoding_and_counts_them():
    decoder, plain = request("encoder-decoder default", PARAMS["plain"])
    counts = []
    for window in (2, 8):
        generation = Generation(decoder, dataclasses.replace(plain, window=window))
        list(jacobi_steps(generation))
        counts.append(generation.forwards)
    assert all(count <= 16 for count in counts)
    generation = Generation(decoder, plain)
    list(generation.steps())
    assert generation.forwards == 16


def enumerated(model, captions: TextBatch, null: TextBatch, params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The probability of every picture of a toy model, from its training graph."""
    tokens, size = model.config.num_tokens, model.config.codebook_size
    table = {}
    sequences = torch.tensor(list(itertools.product(range(size), repeat=tokens)))
    with torch.no_grad():
        guided, other = (model(*(part.expand(len(sequences), -1) for part in text), sequences).image
                         for text in (captions, null))
    chances = torch.ones(len(sequences), dtype=torch.float64)
    for at in range(tokens):
        scale = guidance_at(params, at, tokens)
        logits = guided[:, at] if scale == 1 else guide(guided[:, at], other[:, at], scale)
        chances *= filtered_probabilities(logits, params).double().gather(1, sequences[:, at: at + 1])[:, 0]
    for sequence, chance in zip(sequences.tolist(), chances.tolist(), strict=True):
        table[tuple(sequence)] = chance
    return table


@pytest.mark.long
@pytest.mark.parametrize("window", [1, 3])
def test_samples_follow_the_enumerated_distribution(window):
    model = tiny.seq2seq(codebook_size=3, grid=(2, 2))
    text = tiny.text_tokenizer()
    captions, null = text.encode(["octopus"]), text.null_caption()
    params = SamplingParams(guidance_scale=1.5, top_k=2, temperature=1.2)
    expected = enumerated(model, captions, null, params)
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5)
    draws = 8_000
    decoder = CachedDecoder(model)
    tokens, _ = generate_tokens(decoder, Request(captions, null, draws, params, list(range(draws)), None, window))
    counts = dict.fromkeys(expected, 0)
    for row in tokens.tolist():
        counts[tuple(row)] += 1
    assert all(counts[row] == 0 for row, chance in expected.items() if chance == 0)
    often = [row for row, chance in expected.items() if chance * draws > 5]
    observed, wanted = [counts[row] for row in often], [expected[row] * draws for row in often]
    observed.append(draws - sum(observed))
    wanted.append(draws - sum(wanted))
    keep = [i for i, w in enumerate(wanted) if w > 1]
    statistic = sum((observed[i] - wanted[i]) ** 2 / wanted[i] for i in keep)
    assert len(often) > 5
    assert scipy.stats.chi2.sf(statistic, len(keep) - 1) > 1e-3
