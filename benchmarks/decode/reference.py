"""The work that every sampler gets, and checks of its tokens against the training graph.

Peers differ in caches and kernels, not in results: each is compared with the logits of
`EncoderDecoder.decode` over the same tokens.
"""

# Axes: B images, C captions, n images per caption, R rows (B, or 2B with guidance), T text ids,
#       s tokens sampled, K codebook size

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
"""Largest difference of logits that counts as rounding, relative to the largest logit; 2e-6 was
seen."""
BEGIN_ID, PAD_ID, END_ID = 0, 1, 2  # BART's, which min-dalle takes for granted


class Work(NamedTuple):
    """The first `tokens` image tokens of each of B = C * images images.

    guidance: 1 for conditional rows alone; else each image has a second row that reads `unguided`,
        one caption for all.
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
        """Text ids and mask [R, T] of each row: those of the images, then as many unguided ones."""
        rows = TextBatch(*(part.repeat_interleave(self.images, dim=0) for part in self.captions))
        if self.guidance == 1:
            return rows
        parts = []
        for part, unguided in zip(rows, self.unguided, strict=True):
            parts.append(torch.cat([part, unguided.expand_as(part)]))
        return TextBatch(*parts)


def make_model(config: dict[str, Any], device: str, dtype: str) -> EncoderDecoder:
    """Build a model with seeded random weights.

    Norms and biases are noisy, or a peer that confuses two of them would go unseen. The last code's
    embedding is the begin vector, because min-dalle's loop begins with that code.
    """
    torch.manual_seed(SEED)
    model = EncoderDecoder(Seq2SeqConfig(**config)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.image_embedding.weight[-1] = model.begin_of_image
    return model.to(device, harness.DTYPES[dtype])


def make_work(model: EncoderDecoder, captions: int, images: int, tokens: int,
              guidance: float) -> Work:
    """Make seeded captions, from a full one to one without words; the unguided one has none."""
    config = model.config
    vocabulary = config.text_vocab_size
    if vocabulary is None or vocabulary <= END_ID + 1 or config.text_length < 2:
        raise ValueError(f"captions here are at least 2 of at least {END_ID + 2} text ids; "
                         f"the model reads {config.text_length} of {vocabulary}")
    if not 1 <= tokens <= config.num_tokens:
        raise ValueError(f"tokens {tokens} must be between 1 and the grid's {config.num_tokens}")

    if captions > 1:
        longest = config.text_length
    else:
        longest = max(2, 3 * config.text_length // 4)  # so that a single caption is padded too
    lengths = torch.linspace(longest, 2, captions).round().to(torch.int64)
    generator = torch.Generator().manual_seed(SEED)
    shape = (captions, config.text_length)
    words = torch.randint(END_ID + 1, vocabulary, shape, generator=generator)

    device = model.to_logits.weight.device
    text = _as_captions(words, lengths, device)
    unguided = _as_captions(words[:1], torch.tensor([2]), device)
    return Work(text, unguided, images, tokens, guidance)


def _as_captions(words: Tensor, lengths: Tensor, device: torch.device) -> TextBatch:
    """Put begin, end and padding into ids [C, T]."""
    places = torch.arange(words.shape[1]).expand_as(words)
    ids = words.masked_fill(places == 0, BEGIN_ID)
    ids = ids.masked_fill(places == lengths[:, None] - 1, END_ID)
    mask = places < lengths[:, None]
    ids = ids.masked_fill(~mask, PAD_ID)
    return TextBatch(ids.to(device), mask.to(device))


@torch.no_grad()
def forced_logits(model: EncoderDecoder, work: Work, image_tokens: Tensor) -> Tensor:
    """Logits [R, s, K] of each token of image_tokens [R, s] in [0, K), by the training graph."""
    text = work.row_text
    memory = model.encode_text(*text)
    return model.decode(memory, text.text_mask, image_tokens[:, :-1]).image


def guided(logits: Tensor, guidance: float) -> Tensor:
    """Logits [2B, ...] of conditional and then unguided rows -> [B, ...]; scale 1: unchanged."""
    if guidance == 1:
        return logits
    conditional, unconditional = logits.chunk(2)
    return guide(conditional, unconditional, guidance)


def greedy_ids(model: EncoderDecoder, work: Work) -> Tensor:
    """Most likely tokens [B, s] by our own sampler, which samples all N and returns the first s."""
    params = SamplingParams(temperature=0.0, guidance_scale=float(work.guidance))
    seeds = [SEED] * work.pictures
    request = Request(work.captions, work.unguided, work.images, params, seeds)
    image_tokens, _ = generate_tokens(CachedDecoder(model), request)
    return image_tokens[:, : work.tokens]


def shortfall(logits: Tensor, image_tokens: Tensor) -> float:
    """Largest gap between the best logit and the sampled token's, relative to the largest logit.

    logits [B, s, K], image_tokens [B, s]. 0 if every token is the most likely one, a rounding error
    if some are ties, infinite if a logit is not finite.
    """
    if not bool(logits.isfinite().all()):
        return float("inf")
    chosen = logits.gather(-1, image_tokens[..., None])[..., 0]
    lost = logits.amax(dim=-1) - chosen
    return float(lost.max() / logits.abs().max())


def are_codes(image_tokens: Tensor, shape: tuple[int, int], codebook_size: int) -> bool:
    """Whether these are integers in [0, K), of this shape."""
    if tuple(image_tokens.shape) != shape or image_tokens.is_floating_point():
        return False
    return bool(((image_tokens >= 0) & (image_tokens < codebook_size)).all())


def random_tokens(work: Work, rows: int, codebook_size: int) -> Tensor:
    """Seeded tokens [rows, s], for both samplers to be forced to."""
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(codebook_size, (rows, work.tokens), generator=generator)
    return tokens.to(work.captions.text_mask.device)


def verdict(work: Work, drawn_ok: bool, logits_gap: float | None, greedy_shortfall: float | None,
            greedy_equal_share: float | None) -> dict[str, Any]:
    """Build a row of the verification. None: not comparable, because the weights differ."""
    gaps = [gap for gap in (logits_gap, greedy_shortfall) if gap is not None]
    ok = drawn_ok and all(gap <= TOLERANCE for gap in gaps)
    return {"pictures": work.pictures, "tokens": work.tokens, "guidance": work.guidance,
            "drawn_ok": drawn_ok, "logits_gap": logits_gap, "greedy_shortfall": greedy_shortfall,
            "greedy_equal_share": greedy_equal_share, "tolerance": TOLERANCE, "ok": ok}
