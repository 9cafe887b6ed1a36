"""What a sampler of image tokens is given, and what our training graph says about what it drew.

Peers differ in caches and kernels, not in results: each is held to the logits of `EncoderDecoder.decode` over the same tokens.
"""

# Axes: B pictures, C captions, n pictures a caption, R rows (B, or 2B with guidance), T text ids, s tokens drawn, K codebook

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import SEED
from inference.decoder.cached_decoder import CachedDecoder
from inference.generation.batch import Request
from inference.generation.ways import generate_tokens
from inference.sampling import SamplingParams, guide
from seq2seq import EncoderDecoder, Seq2SeqConfig, TextBatch

TOP_K = 256
TOLERANCE = 1e-3
"""Largest difference of two logits that is rounding, as a share of the largest logit; up to 2e-6 was seen in float32."""
BEGIN_ID, PAD_ID, END_ID = 0, 1, 2  # BART's, which min-dalle takes for granted


class Work(NamedTuple):
    """B = C * images pictures, the first `tokens` image tokens of each.

    guidance 1: the pictures alone; else each also has a row that reads `unguided`, one caption for all.
    """

    captions: TextBatch
    unguided: TextBatch
    images: int
    tokens: int
    guidance: float

    @property
    def pictures(self) -> int:
        """B."""
        return len(self.captions.text_mask) * self.images

    @property
    def row_text(self) -> TextBatch:
        """The text of each row, [R, T] twice: the pictures', then as many unguided ones."""
        rows = TextBatch(*(part.repeat_interleave(self.images, dim=0) for part in self.captions))
        if self.guidance == 1:
            return rows
        return TextBatch(*(torch.cat([part, other.expand_as(part)]) for part, other in zip(rows, self.unguided, strict=True)))


def make_model(config: dict[str, Any], device: str, dtype: str) -> EncoderDecoder:
    """Seeded weights; norms and biases are noisy, or one in another's place would go unseen.

    The last code's embedding is the begin vector: min-dalle's loop begins with that code.
    """
    torch.manual_seed(SEED)
    model = EncoderDecoder(Seq2SeqConfig(**config)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.image_embedding.weight[-1] = model.begin_of_image
    return model.to(device, harness.DTYPES[dtype])


def make_work(model: EncoderDecoder, captions: int, images: int, tokens: int, guidance: float) -> Work:
    """Seeded captions, from a full one to one without words, on the model's device; the unguided one has no words."""
    config = model.config
    if config.text_vocab_size is None or config.text_vocab_size <= END_ID + 1 or config.text_length < 2:
        raise ValueError(f"captions here are at least 2 of at least {END_ID + 2} text ids; the model reads "
                         f"{config.text_length} of {config.text_vocab_size}")
    if not 1 <= tokens <= config.num_tokens:
        raise ValueError(f"tokens {tokens} must be between 1 and the grid's {config.num_tokens}")
    generator = torch.Generator().manual_seed(SEED)
    longest = config.text_length if captions > 1 else max(2, 3 * config.text_length // 4)  # one alone is padded too
    lengths = torch.linspace(longest, 2, captions).round().to(torch.int64)
    words = torch.randint(END_ID + 1, config.text_vocab_size, (captions, config.text_length), generator=generator)

    def text(ids: Tensor, lengths: Tensor) -> TextBatch:
        places = torch.arange(config.text_length).expand_as(ids)
        ids = ids.masked_fill(places == 0, BEGIN_ID).masked_fill(places == lengths[:, None] - 1, END_ID)
        mask = places < lengths[:, None]
        return TextBatch(*(part.to(model.to_logits.weight.device) for part in (ids.masked_fill(~mask, PAD_ID), mask)))

    return Work(text(words, lengths), text(words[:1], torch.tensor([2])), images, tokens, guidance)


@torch.no_grad()
def forced_logits(model: EncoderDecoder, work: Work, image_tokens: Tensor) -> Tensor:
    """Logits [R, s, K] of each token of image_tokens [R, s] in [0, K), by the training graph."""
    text = work.row_text
    return model.decode(model.encode_text(*text), text.text_mask, image_tokens[:, :-1]).image


def guided(logits: Tensor, guidance: float) -> Tensor:
    """Logits [2B, ...] of pictures and then their unguided rows -> [B, ...]; as they are with guidance 1."""
    if guidance == 1:
        return logits
    conditional, unconditional = logits.chunk(2)
    return guide(conditional, unconditional, guidance)


def greedy_ids(model: EncoderDecoder, work: Work) -> Tensor:
    """The likeliest tokens [B, s], drawn by our own sampler (all N, of which the first s are given)."""
    params = SamplingParams(temperature=0.0, guidance_scale=float(work.guidance))
    request = Request(work.captions, work.unguided, work.images, params, [SEED] * work.pictures)
    return generate_tokens(CachedDecoder(model), request)[0][:, : work.tokens]


def shortfall(logits: Tensor, image_tokens: Tensor) -> float:
    """By how much a token of [B, s] is less likely than the likeliest, the largest as a share of the largest logit
    [B, s, K]: 0 when every token is the likeliest, roundings when some are ties. Infinite if a logit is not finite."""
    if not bool(logits.isfinite().all()):
        return float("inf")
    lost = logits.amax(dim=-1) - logits.gather(-1, image_tokens[..., None])[..., 0]
    return float(lost.max() / logits.abs().max())


def are_codes(image_tokens: Tensor, shape: tuple[int, int], codebook_size: int) -> bool:
    """Whether these are whole numbers in [0, K), of this shape."""
    return tuple(image_tokens.shape) == shape and not image_tokens.is_floating_point() \
        and bool(((image_tokens >= 0) & (image_tokens < codebook_size)).all())


def random_tokens(work: Work, rows: int, codebook_size: int) -> Tensor:
    """Seeded tokens [rows, s] to force upon both."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(codebook_size, (rows, work.tokens), generator=generator).to(work.captions.text_mask.device)


def verdict(work: Work, drawn_ok: bool, logits_gap: float | None, greedy_shortfall: float | None,
            greedy_equal_share: float | None) -> dict[str, Any]:
    """A row of the document's verification. None: there is nothing to compare, the weights are others."""
    gaps = [gap for gap in (logits_gap, greedy_shortfall) if gap is not None]
    return {"pictures": work.pictures, "tokens": work.tokens, "guidance": work.guidance, "drawn_ok": drawn_ok,
            "logits_gap": logits_gap, "greedy_shortfall": greedy_shortfall, "greedy_equal_share": greedy_equal_share,
            "tolerance": TOLERANCE, "ok": drawn_ok and all(gap <= TOLERANCE for gap in gaps)}
