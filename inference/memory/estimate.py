"""How much memory sampling needs, worked out from the configs before anything is allocated, and how much there is.

Weights are counted on models built without memory (torch's meta device), caches from their shapes, and the image tokenizer's
decoder by running it on the meta device, where tensors have shapes and no numbers, and adding up what is alive at once.
"""

# Axes: B pictures, C captions, R rows (a picture, or one of its branches under guidance), N image tokens, S slots of the
#       sequence, T text slots, G key/value heads, d head width, D width, K codebook size

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from inference.memory.available import available_memory
from inference.memory.parts import (
    WEIGHT_BYTES,
    _Sizes,
    _sizes,
    _slot_bytes,
    _tokenizer_bytes,
    picture_bytes,
)
from inference.memory.sizes import _both
from seq2seq import TransformerConfig
from tokenizer_image.config import ImageTokenizerConfig
from tokenloom_common.errors import UserError, choose

FIRST_USE = 24 << 20
"""Bytes that the first use of a process's kernels takes once: thread pools and scratch (15 MiB measured in float32 and 21 in
bfloat16, torch 2.13, CPU)."""
DRAWING_BYTES = 48
"""Bytes of a number of the guided logits [B, K] while a token is drawn: filtered, sorted with its order, with its noise (37 at
most of several samplers, counted on the CPU)."""
PILLOW_BYTES = 4
"""Bytes of an RGB pixel in a Pillow image."""
MOST_PICTURES = 1 << 24


@dataclass(frozen=True)
class Workload:
    """What is sampled at a time: `pictures` of `captions` different captions, with or without guidance.

    weights: precision of the decoder's matrices. dtype: of everything else and of the caches; None = that of the weights, and
    float32 with int8 weights. decoded: pictures that become pixels at a time (None = `pictures`); kept: pictures of the whole
    request (None = `pictures`); streamed: pictures are decoded while others are still drawn; window: tokens of a picture that
    Jacobi decoding works on at once; unguided_each: guidance leads away from a text of each caption's own, not from one for
    all. UserError for a count below 1.
    """

    pictures: int = 1
    captions: int = 1
    guided: bool = True
    weights: str = "float32"
    dtype: Literal["float32", "bfloat16"] | None = None
    decoded: int | None = None
    kept: int | None = None
    streamed: bool = False
    window: int = 1
    unguided_each: bool = False

    def __post_init__(self) -> None:
        choose(WEIGHT_BYTES, self.weights, "precision of weights")
        for name in ("pictures", "captions", "decoded", "kept", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")

    @classmethod
    def of_request(cls, prompts: int, num_images: int, batch_size: int, **others: Any) -> Workload:
        """The largest batch of `num_images` pictures of each prompt in batches of `batch_size`, as TextToImage makes them."""
        captions = min(prompts, max(1, batch_size // num_images))
        whole = prompts * num_images
        return cls(captions * min(num_images, batch_size), captions, decoded=min(batch_size, whole), kept=whole, **others)

    @property
    def rows(self) -> int:
        """R."""
        return self.pictures * (2 if self.guided else 1)

    @property
    def texts(self) -> int:
        """Captions that are worked through: under guidance also the null caption or negative prompt, or each caption's own."""
        return self.captions + self.guided * (self.captions if self.unguided_each else 1)

    @property
    def number_bytes(self) -> int:
        """Bytes of an activation or a number of a cache."""
        return WEIGHT_BYTES[self.dtype or ("bfloat16" if self.weights == "bfloat16" else "float32")]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. Drawing tokens and decoding them to pixels follow one another, so that only the larger counts, unless streamed.

    weights: of the transformer, its own text encoder included (a frozen one is not). image_tokenizer: of both its halves.
    self_cache: keys and values of the sequences. caption_memory: keys and values of the captions, one set for all pictures of
    a caption (decoder-only models copy them into the self cache, and hold both).
    working: the largest of what a step, the captions' encoder and the sampler hold for a moment. pictures: decoding to pixels.
    results: the finished pictures, in main memory on any device.
    """

    weights: int
    image_tokenizer: int
    self_cache: int
    caption_memory: int
    working: int
    pictures: int
    results: int
    rows: int
    pictures_at_once: int
    streamed: bool = False

    @property
    def drawing(self) -> int:
        """Bytes beyond the weights while tokens are drawn."""
        return self.self_cache + self.caption_memory + self.working

    @property
    def beyond_weights(self) -> int:
        """Bytes that a loaded model needs on its device."""
        return self.drawing + self.pictures if self.streamed else max(self.drawing, self.pictures)

    @property
    def total(self) -> int:
        """All bytes of sampling, the loaded model included. Loading itself holds the float32 weights for a moment."""
        return self.weights + self.image_tokenizer + self.beyond_weights + self.results


def estimate(config: TransformerConfig, tokenizer: ImageTokenizerConfig | None, work: Workload) -> MemoryEstimate:
    """What sampling `work` needs, of either family of transformers; without an image tokenizer its parts are 0."""
    sizes = _sizes(config)
    number, slot = work.number_bytes, _slot_bytes(config, work.number_bytes)
    fixed, each = (0, 0) if tokenizer is None else picture_bytes(tokenizer)
    decoded = work.decoded or work.pictures
    side = 0 if tokenizer is None else tokenizer.resolution
    return MemoryEstimate(
        weights=sizes.weight_bytes(work.weights, number),
        image_tokenizer=0 if tokenizer is None else _tokenizer_bytes(tokenizer),
        self_cache=work.rows * sizes.slots * slot,
        caption_memory=work.texts * (sizes.text_slots or config.text_length) * slot,
        working=_working(config, sizes, work) + FIRST_USE,
        pictures=0 if tokenizer is None else fixed + each * decoded + FIRST_USE,
        results=(work.kept or work.pictures) * (PILLOW_BYTES * side**2 + 8 * config.num_tokens),
        rows=work.rows, pictures_at_once=work.pictures, streamed=work.streamed)


def largest_batch(config: TransformerConfig, tokenizer: ImageTokenizerConfig | None, work: Workload, memory: int,
                  loaded: bool = False) -> int:
    """How many pictures at a time fit into `memory` bytes, 0 if not one does; all else as in `work`.

    loaded: the weights are there already, and the finished pictures are somebody else's, so `memory` is for sampling alone.
    """
    def fits(pictures: int) -> bool:
        some = replace(work, pictures=pictures, captions=min(work.captions, pictures), decoded=pictures)
        needs = estimate(config, tokenizer, some)
        return (needs.beyond_weights if loaded else needs.total) <= memory

    if not fits(1):
        return 0
    low, high = 1, 2
    while high < MOST_PICTURES and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def check_fits(needed: int, available: int | None, what: str, remedy: str) -> None:
    """UserError, one line, when `needed` bytes are more than are available; None = unknown, which passes."""
    if available is not None and needed > available:
        raise UserError(f"{what} needs {_both(needed)} of memory, and {_both(max(0, available))} are there; {remedy}")


def check_sampling(config: TransformerConfig, tokenizer: ImageTokenizerConfig | None, work: Workload,
                   device: str | torch.device) -> MemoryEstimate:
    """Refuse, before anything is allocated, what a loaded model on `device` has no memory for. UserError with the bytes."""
    needs = estimate(config, tokenizer, work)
    on_device, results = available_memory(device), needs.results
    in_main = on_device if torch.device(device).type == "cpu" else available_memory("cpu")
    check_fits(results, in_main, f"keeping all pictures ({work.kept or work.pictures:,})", "ask for fewer pictures at once")
    if torch.device(device).type == "cpu" and on_device is not None:
        on_device -= results
    if on_device is not None and needs.beyond_weights > on_device:
        fit = largest_batch(config, tokenizer, work, on_device, loaded=True)
        check_fits(needs.beyond_weights, on_device, f"sampling {work.pictures:,} at a time", remedy(fit, work))
    return needs


def remedy(fit: int, work: Workload) -> str:
    """What to do instead, where `fit` pictures at a time fit."""
    if fit:
        how = f"num_images={fit}" if work.streamed and work.kept is None else f"--batch-size {fit} (batch_size={fit})"
        return f"{fit:,} at a time would fit: {how}"
    smaller = {"float32": "bfloat16 or int8 weights, ", "bfloat16": "int8 weights, "}.get(work.weights, "")
    return f"not even one at a time fits; use {smaller}a smaller model, or more memory"


# ---- what there is


# ---- the parts


def _working(config: TransformerConfig, sizes: _Sizes, work: Workload) -> int:
    """The larger of encoding the captions and of a step with its sampling."""
    number = work.number_bytes
    inner = round(config.feedforward_multiplier * config.width) * (1 if config.feedforward == "gelu" else 2)
    kv = (config.kv_heads or config.heads) * config.head_dim
    # residual, normed and added; queries, keys and values as projected and turned; what they mix; a feed-forward's two sides
    activations = (4 * config.width + 2 * (config.heads * config.head_dim + 2 * kv) + config.heads * config.head_dim
                   + 2 * inner) * number
    text_input = 4 * (config.text_feature_width or 2)  # float32 features, or int64 ids
    encoding = work.captions * (sizes.text_slots or config.text_length) * (activations + text_input)
    seen = work.rows * sizes.slots * (1 if work.window == 1 else 5 * work.window)  # masks: bool, in a window also as float
    steps = work.rows * max(config.layout_tokens + 1, work.window) * activations + seen
    logits = work.rows * work.window * config.codebook_size * (4 + (number if number != 4 else 0))
    drawing = work.pictures * work.window * config.codebook_size * DRAWING_BYTES
    tokens = work.pictures * (config.num_tokens + config.layout_tokens) * 3 * 8  # random numbers, drawn ids, ids together
    tables = sizes.slots * (config.width * number + config.head_dim * 4)  # positions and angles, worked out from parameters
    unpacked = sizes.largest * number if work.weights != "float32" else 0
    return max(encoding, steps + logits + drawing) + tokens + tables + unpacked


