"""Captions -> image tokens, one token after another, with guidance."""

# Axes: B pictures, C captions, n pictures a caption, N image tokens, K codebook size

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from inference.decoder import CachedDecoder
from inference.sampling import SamplingParams, guide, sample, uniform_numbers
from seq2seq import TextBatch


def decode_steps(decoder: CachedDecoder, captions: TextBatch, null: TextBatch, images: int, params: SamplingParams,
                 seeds: list[int]) -> Iterator[Tensor]:
    """Yield the next ids [B] int64 for each of the N positions; B = C * images, a caption's pictures in a row.

    captions [C, T]; null [1, T] is the caption of the unconditional branch; seeds has one entry a picture.
    """
    rows = len(captions.text_ids) * images
    guided = params.guidance_scale != 1.0
    groups = [decoder.prefill(captions, images)]
    if guided:
        groups.append(decoder.prefill(null, rows))
    cache = decoder.new_cache(rows * len(groups))
    uniform = uniform_numbers(seeds, decoder.config.num_tokens)  # [B, N]
    previous = None
    for position in range(decoder.config.num_tokens):
        logits = decoder.decode_one(previous, position, groups, cache).float()
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = guide(conditional, unconditional, params.guidance_scale)
        next_ids = sample(logits, params, uniform[:, position])
        yield next_ids
        previous = torch.cat([next_ids] * len(groups))


def generate_tokens(decoder: CachedDecoder, captions: TextBatch, null: TextBatch, images: int, params: SamplingParams,
                    seeds: list[int]) -> Tensor:
    """All steps of `decode_steps` -> image_tokens [B, N] int64 in raster order."""
    return torch.stack(list(decode_steps(decoder, captions, null, images, params, seeds)), dim=1)
