"""Jobs of the scheduler's tests, and the check that every image is as if it were alone."""

from __future__ import annotations

import torch

from inference.decoder.cached_decoder import CachedDecoder
from inference.generation.batch import Request
from inference.generation.image_job import FinishedImage, ImageJob
from inference.generation.ways import generate_tokens
from inference.sampling import SamplingParams
from seq2seq import TextBatch
from tests.decoder_shapes import caption

PLAIN = SamplingParams(guidance_scale=1.0, top_k=8)
KINDS = {
    "guided": SamplingParams(guidance_scale=2.5, top_k=8),
    "cooler": SamplingParams(guidance_scale=1.0, top_k=0, temperature=0.7, top_p=0.9),
    "cosine, half": SamplingParams(guidance_scale=4.0, guidance_schedule="cosine", guidance_power=0.7, guidance_end=0.5),
    "linear": SamplingParams(guidance_scale=3.0, guidance_schedule="linear", min_p=0.05),
    "greedy": SamplingParams(guidance_scale=1.0, temperature=0.0),
    "short guidance": SamplingParams(guidance_scale=3.0, guidance_end=0.01),
}


def row(text: TextBatch, at: int) -> TextBatch:
    return caption(text, slice(at, at + 1))


def job(text: TextBatch, at: int, params: SamplingParams, seeds, layout=None, unconditional: int = 2, name=None) -> ImageJob:
    return ImageJob(row(text, at), row(text, unconditional), params, list(seeds), layout, name)


def alone(decoder: CachedDecoder, one: ImageJob):
    """Tokens [n, N] and layout [n, L] as `inference.generation.ways` draws them."""
    return generate_tokens(decoder, Request(one.captions, one.unconditional, len(one.seeds), one.params, one.seeds, one.layout))


def check_equal(decoder: CachedDecoder, jobs: dict[int, ImageJob], ended) -> None:
    """Every picture of `jobs` (by ticket) came once, with the tokens and the layout that it has alone."""
    assert all(isinstance(picture, FinishedImage) for picture in ended), ended
    assert sorted((p.ticket, p.index) for p in ended) == [(t, i) for t, one in jobs.items() for i in range(len(one.seeds))]
    expected = {ticket: alone(decoder, one) for ticket, one in jobs.items()}
    for picture in ended:
        tokens, layouts = expected[picture.ticket]
        assert picture.image_tokens.dtype == torch.int64
        assert torch.equal(picture.image_tokens, tokens[picture.index]), (picture.ticket, picture.index)
        assert (picture.layout is None) == (layouts is None)
        assert layouts is None or torch.equal(picture.layout, layouts[picture.index])
