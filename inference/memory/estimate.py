"""Predict the memory of sampling from configs, and compare it with what is available.

Weights are counted on models built without memory (torch's meta device), caches from their shapes,
and the image tokenizer's decoder by running it on the meta device, where tensors have shapes and no
numbers, and adding up what is alive at once.
"""

# Axes: R rows (an image, or one of its branches under guidance), S slots of the sequence,
#       T text slots, N image tokens, B images, K codebook size

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from inference.memory.available import available_memory
from inference.memory.parts import (
    WEIGHT_BYTES,
    TransformerSizes,
    picture_bytes,
    slot_bytes,
    tokenizer_bytes,
    transformer_sizes,
)
from inference.memory.sizes import exact_and_human
from seq2seq import TransformerConfig
from tokenizer_image.config import ImageTokenizerConfig
from tokenloom_common.errors import UserError, choose

FIRST_USE = 24 << 20
"""Bytes that a process's first use of its kernels takes once: thread pools and scratch memory
(measured: 15 MiB in float32, 21 in bfloat16; torch 2.13, CPU)."""
DRAWING_BYTES = 48
"""Bytes per number of the guided logits [B, K] while a token is drawn: filtered, sorted with the
order, with noise (37 at most over several samplers, counted on the CPU)."""
PILLOW_BYTES = 4
"""Bytes of an RGB pixel in a Pillow image."""
MOST_PICTURES = 1 << 24


@dataclass(frozen=True)
class Workload:
    """The sampling to predict: `pictures` images at a time of `captions` different captions.

    weights: precision of the decoder's matrices.
    dtype: of everything else and of the caches; None = that of the weights (of int8: float32).
    decoded: images that become pixels at a time (None = `pictures`).
    kept: images of the whole request (None = `pictures`).
    streamed: images are decoded while others are still drawn.
    window: tokens of an image that Jacobi decoding works on at once.
    unguided_each: each caption has an unconditional text of its own, instead of one for all.

    UserError for a count below 1.
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
        """Return the largest batch that TextToImage makes of num_images images per prompt."""
        captions = min(prompts, max(1, batch_size // num_images))
        pictures = captions * min(num_images, batch_size)
        total = prompts * num_images
        return cls(pictures, captions, decoded=min(batch_size, total), kept=total, **others)

    @property
    def rows(self) -> int:
        """R, with both branches under guidance."""
        return self.pictures * (2 if self.guided else 1)

    @property
    def texts(self) -> int:
        """Texts that are prefilled: the captions, and under guidance the unconditional ones."""
        if not self.guided:
            return self.captions
        return self.captions + (self.captions if self.unguided_each else 1)

    @property
    def number_bytes(self) -> int:
        """Bytes of an activation, or of a number in a cache."""
        if self.dtype is not None:
            return WEIGHT_BYTES[self.dtype]
        return WEIGHT_BYTES["bfloat16" if self.weights == "bfloat16" else "float32"]


@dataclass(frozen=True)
class MemoryEstimate:
    """Predicted bytes.

    weights: of the transformer, with its own text encoder (a frozen one is not counted).
    image_tokenizer: of both its halves.
    self_cache: keys and values of the sequences.
    caption_memory: keys and values of the captions, one set for all images of a caption
    (decoder-only models copy them into the self cache, and hold both).
    working: the largest of what a step, the captions' encoder and the sampler hold for a moment.
    pictures: decoding to pixels.
    results: the finished images, in main memory on any device.

    Unless streamed, drawing tokens and decoding them follow one another: only the larger counts.
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
        if self.streamed:
            return self.drawing + self.pictures
        return max(self.drawing, self.pictures)

    @property
    def total(self) -> int:
        """All bytes of sampling, with the loaded model.

        Loading also holds the float32 weights for a moment.
        """
        return self.weights + self.image_tokenizer + self.beyond_weights + self.results


def estimate(config: TransformerConfig, tokenizer: ImageTokenizerConfig | None,
             work: Workload) -> MemoryEstimate:
    """Predict the memory of sampling `work` with either family of transformers.

    Without an image tokenizer its parts are 0.
    """
    sizes = transformer_sizes(config)
    slot = slot_bytes(config, work.number_bytes)
    results_each = 8 * config.num_tokens  # int64 tokens
    # FIRST_USE is in `working` and in `pictures`, since only the larger of them may count
    tokenizer_weights = decoding = 0
    if tokenizer is not None:
        tokenizer_weights = tokenizer_bytes(tokenizer)
        fixed, each = picture_bytes(tokenizer)
        decoding = fixed + each * (work.decoded or work.pictures) + FIRST_USE
        results_each += PILLOW_BYTES * tokenizer.resolution**2
    return MemoryEstimate(
        weights=sizes.weight_bytes(work.weights, work.number_bytes),
        image_tokenizer=tokenizer_weights,
        self_cache=work.rows * sizes.slots * slot,
        caption_memory=work.texts * (sizes.text_slots or config.text_length) * slot,
        working=_working_bytes(config, sizes, work) + FIRST_USE,
        pictures=decoding,
        results=(work.kept or work.pictures) * results_each,
        rows=work.rows, pictures_at_once=work.pictures, streamed=work.streamed)


def _working_bytes(config: TransformerConfig, sizes: TransformerSizes, work: Workload) -> int:
    """Return the larger of encoding the captions and of a decoder step with its sampling."""
    number = work.number_bytes

    # activations of one slot in one layer: residual, normed and added; queries, keys and values as
    # projected and as rotated; attention's output; both sides of a feed-forward, twice if gated
    queries = config.heads * config.head_dim
    kv = (config.kv_heads or config.heads) * config.head_dim
    feedforward = round(config.feedforward_multiplier * config.width)
    if config.feedforward != "gelu":
        feedforward *= 2
    numbers = 4 * config.width + 2 * (queries + 2 * kv) + queries + 2 * feedforward
    activations = numbers * number

    text_input = 4 * (config.text_feature_width or 2)  # float32 features, or int64 ids
    text_slots = sizes.text_slots or config.text_length
    encoding = work.captions * text_slots * (activations + text_input)

    slots_at_once = max(config.layout_tokens + 1, work.window)
    mask_bytes = 1 if work.window == 1 else 5 * work.window  # bool, in a window also as float
    step = work.rows * (slots_at_once * activations + sizes.slots * mask_bytes)
    logit_bytes = 4 if number == 4 else 4 + number  # float32, and as computed if that is less
    logits = work.rows * work.window * config.codebook_size * logit_bytes
    drawing = work.pictures * work.window * config.codebook_size * DRAWING_BYTES

    # held throughout: noise keys, drawn ids and all ids together, int64
    tokens = work.pictures * (config.num_tokens + config.layout_tokens) * 3 * 8
    # positions and rotary angles, computed from parameters
    tables = sizes.slots * (config.width * number + config.head_dim * 4)
    # the float32 matrix that is rounded to the weights' precision
    unpacked = sizes.largest * number if work.weights != "float32" else 0
    return max(encoding, step + logits + drawing) + tokens + tables + unpacked


# ---- what fits


def largest_batch(config: TransformerConfig, tokenizer: ImageTokenizerConfig | None, work: Workload,
                  memory: int, loaded: bool = False) -> int:
    """Return how many images at a time fit into `memory` bytes, all else as in `work`; may be 0.

    loaded: `memory` is for sampling alone, without the weights and the finished images.
    """
    def fits(pictures: int) -> bool:
        captions = min(work.captions, pictures)
        needs = estimate(config, tokenizer,
                         replace(work, pictures=pictures, captions=captions, decoded=pictures))
        return (needs.beyond_weights if loaded else needs.total) <= memory

    if not fits(1):
        return 0
    low, high = 1, 2
    while high < MOST_PICTURES and fits(high):
        low, high = high, high * 2
    while high - low > 1:  # low fits, high does not
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def check_fits(needed: int, available: int | None, what: str, remedy: str) -> None:
    """Raise UserError if `needed` bytes are not available; None = unknown, which passes."""
    if available is not None and needed > available:
        raise UserError(f"{what} needs {exact_and_human(needed)} of memory, "
                        f"and {exact_and_human(max(0, available))} are there; {remedy}")


def check_sampling(config: TransformerConfig, tokenizer: ImageTokenizerConfig | None,
                   work: Workload, device: str | torch.device) -> MemoryEstimate:
    """Refuse, before anything is allocated, what a loaded model on `device` has no memory for.

    UserError with the bytes, and with the batch size that would fit.
    """
    needs = estimate(config, tokenizer, work)
    on_cpu = torch.device(device).type == "cpu"
    available = available_memory(device)
    in_main_memory = available if on_cpu else available_memory("cpu")
    kept = work.kept or work.pictures
    check_fits(needs.results, in_main_memory, f"keeping all pictures ({kept:,})",
               "ask for fewer pictures at once")
    if available is None:
        return needs

    if on_cpu:
        available -= needs.results
    if needs.beyond_weights > available:
        fitting = largest_batch(config, tokenizer, work, available, loaded=True)
        check_fits(needs.beyond_weights, available, f"sampling {work.pictures:,} at a time",
                   _remedy(fitting, work))
    return needs


def _remedy(fitting: int, work: Workload) -> str:
    """Say what to do instead, if `fitting` images at a time fit."""
    if fitting:
        if work.streamed and work.kept is None:  # TextToImage.stream, which has no batch size
            option = f"num_images={fitting}"
        else:
            option = f"--batch-size {fitting} (batch_size={fitting})"
        return f"{fitting:,} at a time would fit: {option}"
    smaller = ""
    if work.weights == "float32":
        smaller = "bfloat16 or int8 weights, "
    elif work.weights == "bfloat16":
        smaller = "int8 weights, "
    return f"not even one at a time fits; use {smaller}a smaller model, or more memory"
