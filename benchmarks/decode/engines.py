"""Our ways to sample image tokens, as cases of `benchmarks decode` beside the peers."""

# Axes: B images, R rows (B, or 2B with guidance), s tokens sampled, K codebook size

from __future__ import annotations

import copy
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.decode.reference import (
    TOP_K,
    Work,
    are_codes,
    forced_logits,
    make_model,
    make_work,
    verdict,
)
from benchmarks.harness import SEED, Case
from inference.decoder.cached_decoder import CachedDecoder
from inference.decoder.calibration import matmul_strategy_for
from inference.generation.batch import Generation, Request
from inference.generation.ways import token_steps
from inference.sampling import SamplingParams
from seq2seq import EncoderDecoder

INT8_TOLERANCE = 0.1
"""Largest mean difference of logits in 8 bits, relative to the logits' standard deviation."""


class Mode(NamedTuple):
    """One way to sample: with 8-bit matrices or not, with a Jacobi window of so many tokens."""

    int8: bool = False
    window: int = 1

    @property
    def name(self) -> str:
        """Name in tables: `ours`, `ours int8`, `ours jacobi 8`."""
        words = ["ours"]
        if self.int8:
            words.append("int8")
        if self.window > 1:
            words.append(f"jacobi {self.window}")
        return " ".join(words)


class OurEngine:
    """Samples through `inference.generation.ways`, from a copy of the model."""

    def __init__(self, model: EncoderDecoder, int8: bool = False) -> None:
        model = copy.deepcopy(model)  # the decoder takes its parameters over
        self.matmul = matmul_strategy_for(model, int8)
        self.decoder = CachedDecoder(model, int8=int8, matmul=self.matmul)
        self.int8 = int8
        self.forwards = 0  # decoder steps of the last `sample`

    def sample(self, work: Work, window: int = 1, temperature: float = 1.0) -> Tensor:
        """Sample tokens [B, s] in [0, K)."""
        params = SamplingParams(
            guidance_scale=float(work.guidance), top_k=TOP_K, temperature=temperature)
        seeds = list(range(SEED, SEED + work.pictures))
        request = Request(work.captions, work.unguided, work.images, params, seeds, None, window)
        generation = Generation(self.decoder, request)
        tokens = list(itertools.islice(token_steps(generation), work.tokens))
        self.forwards = generation.forwards
        return torch.stack(tokens, dim=1)

    def verify(self, model: EncoderDecoder, work: Work) -> dict[str, Any]:
        """Compare the decoder's logits over its own tokens with those of the training graph."""
        drawn = self.sample(work)
        drawn_ok = are_codes(drawn, (work.pictures, work.tokens), model.config.codebook_size)
        rows = drawn.repeat(1 if work.guidance == 1 else 2, 1)  # [R, s]
        expected = forced_logits(model, work, rows)
        difference = (self._forced(work, rows) - expected).abs()
        if not self.int8:
            gap = float(difference.max() / expected.abs().max())
            return verdict(work, drawn_ok, gap, None, None)

        # 8 bits round every logit a little: their mean is compared, not the largest difference
        gap = float(difference.mean() / expected.std())
        ok = gap <= INT8_TOLERANCE and drawn_ok
        return {"pictures": work.pictures, "tokens": work.tokens, "guidance": work.guidance,
                "mean_gap": gap, "tolerance": INT8_TOLERANCE, "ok": ok}

    def _forced(self, work: Work, image_tokens: Tensor) -> Tensor:
        """Logits [R, s, K] of the decoder with its cache, over given tokens [R, s]."""
        groups = [self.decoder.prefill(work.captions, work.images)]
        if work.guidance != 1:
            groups.append(self.decoder.prefill(work.unguided, work.pictures))
        cache = self.decoder.new_cache(groups)

        steps = []
        previous = None
        for position in range(work.tokens):
            steps.append(self.decoder.decode_one(previous, position, groups, cache))
            previous = image_tokens[:, position]
        return torch.stack(steps, dim=1).float()


def our_case(pictures: int, tokens: int, guidance: float, config: dict[str, Any], device: str,
             dtype: str, int8: bool = False, window: int = 1) -> Case:
    """Sample `tokens` tokens of each image from random weights; the arguments are JSON values."""
    model = make_model(config, device, dtype)
    engine = OurEngine(model, int8)
    work = make_work(model, pictures, 1, tokens, guidance)
    del model  # the engine has a copy: memory is measured with one
    return lambda: engine.sample(work, window)
