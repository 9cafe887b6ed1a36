"""Our ways of drawing image tokens, as cases of `benchmarks decode` beside the peers of `decode_peers`."""

# Axes: B pictures, s tokens drawn

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
from inference.decoder.calibration import way_for
from inference.generation.batch import Generation, Request
from inference.generation.ways import token_steps
from inference.sampling import SamplingParams
from seq2seq import EncoderDecoder

INT8_TOLERANCE = 0.1
"""Largest mean difference of logits with 8-bit weights and inputs, as a share of the logits' spread."""


class Mode(NamedTuple):
    """One way: 8-bit matrices or not, tokens that Jacobi decoding works on at once."""

    int8: bool = False
    window: int = 1

    @property
    def name(self) -> str:
        """For people: `ours`, `ours int8`, `ours jacobi 8`."""
        return " ".join(["ours", *(["int8"] if self.int8 else []), *([f"jacobi {self.window}"] if self.window > 1 else [])])


class OurEngine:
    """Draws some work through `inference.generation.ways`; with a copy of the model, which the decoder takes over."""

    def __init__(self, model: EncoderDecoder, int8: bool = False) -> None:
        model = copy.deepcopy(model)
        self.way = way_for(model, int8)
        self.decoder = CachedDecoder(model, int8=int8, way=self.way)
        self.int8 = int8
        self.forwards = 0

    def sample(self, work: Work, window: int = 1, temperature: float = 1.0) -> Tensor:
        """Tokens [B, s] in [0, K); `forwards` says how many decoder steps they took."""
        params = SamplingParams(guidance_scale=float(work.guidance), top_k=TOP_K, temperature=temperature)
        seeds = list(range(SEED, SEED + work.pictures))
        generation = Generation(self.decoder, Request(work.captions, work.unguided, work.images, params, seeds, None, window))
        drawn = torch.stack(list(itertools.islice(token_steps(generation), work.tokens)), dim=1)
        self.forwards = generation.forwards
        return drawn

    def verify(self, model: EncoderDecoder, work: Work) -> dict[str, Any]:
        """Whether this engine's logits over tokens that it drew are those of the training graph of `model`."""
        drawn = self.sample(work)
        rows = drawn.repeat(1 if work.guidance == 1 else 2, 1)
        expected = forced_logits(model, work, rows)
        found = self._forced(work, rows)
        if self.int8:
            gap = float((found - expected).abs().mean() / expected.std())
            ok = gap <= INT8_TOLERANCE and are_codes(drawn, (work.pictures, work.tokens), model.config.codebook_size)
            return {"pictures": work.pictures, "tokens": work.tokens, "guidance": work.guidance, "mean_gap": gap,
                    "tolerance": INT8_TOLERANCE, "ok": ok}
        gap = float((found - expected).abs().max() / expected.abs().max())
        return verdict(work, are_codes(drawn, (work.pictures, work.tokens), model.config.codebook_size), gap, None, None)

    def _forced(self, work: Work, image_tokens: Tensor) -> Tensor:
        """Logits [R, s, K] of the decoder with its cache, over given tokens."""
        groups = [self.decoder.prefill(work.captions, work.images)]
        if work.guidance != 1:
            groups.append(self.decoder.prefill(work.unguided, work.pictures))
        cache = self.decoder.new_cache(groups)
        steps = [self.decoder.decode_one(None if at == 0 else image_tokens[:, at - 1], at, groups, cache)
                 for at in range(work.tokens)]
        return torch.stack(steps, dim=1).float()


def our_case(pictures: int, tokens: int, guidance: float, config: dict[str, Any], device: str, dtype: str, int8: bool = False,
             window: int = 1) -> Case:
    """The first `tokens` tokens of `pictures` pictures of random weights, from text ids on. The arguments are JSON values."""
    model = make_model(config, device, dtype)
    engine = OurEngine(model, int8)
    work = make_work(model, pictures, 1, tokens, guidance)
    del model
    return lambda: engine.sample(work, window)
