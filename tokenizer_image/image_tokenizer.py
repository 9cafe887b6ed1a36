"""The contract that every image tokenizer keeps: image <-> grid of codes.

Axes: B batch, S pixels of a side, h w code grid, D length of a code vector, K codebook size.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from tokenizer_image.config import ImageTokenizerConfig
from tokenizer_image.layers import Checkpointed
from tokenizer_image.quantizers import LossPart
from tokenloom_common.errors import UserError
from tokenloom_common.pretrained import PretrainedModule

CHANNELS_LAST_PIXELS = 32_768
"""Pixels of a batch from which channels-last convolutions are the faster ones on a CPU."""


class Reconstruction(NamedTuple):
    """What training needs: reconstruction [B, 3, S, S] unclamped, codes [B, h, w] int64, the model's own loss parts by name."""

    reconstruction: Tensor
    codes: Tensor
    losses: dict[str, LossPart]


class ImageTokenizer(PretrainedModule):
    """`encode` and `decode` are for use, `forward` is for training. A subclass gives the four parts between them."""

    config: ImageTokenizerConfig
    code_parts: tuple[str, ...]
    """Names of the modules that decide codes; the others only turn codes into pixels."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook_size = config.codebook_size
        self.grid = config.grid
        self.num_tokens = config.num_tokens
        self.depth = config.depth
        self.codes_frozen = False

    # ---- what a family is made of

    @abstractmethod
    def latents(self, image: Tensor) -> Tensor:
        """Image [B, 3, S, S] -> latents [B, D, h, w/depth], before quantizing."""

    @abstractmethod
    def codes_of(self, latents: Tensor) -> Tensor:
        """Latents -> codes [B, h, w] int64 in [0, K); changes nothing."""

    @abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] in [0, K) -> code vectors [B, D, h, w/depth], in the dtype that the decoder runs in."""

    @abstractmethod
    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Code vectors [B, D, h, w/depth] -> image [B, 3, S, S], unclamped, with gradients."""

    @abstractmethod
    def reconstruct(self, image: Tensor) -> Reconstruction:
        """A training step's forward, with gradients everywhere; a codebook may learn from it."""

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """All code vectors [K, D] float32, or [depth*K, D] with a residual quantizer."""

    @property
    @abstractmethod
    def last_layer(self) -> Tensor:
        """The weight that an adaptive adversarial loss compares gradients at."""

    def code_settings(self) -> dict[str, Any]:
        """JSON-able settings that decide codes beyond the weights' shapes."""
        return {"kind": self.kind, "resolution": self.config.resolution}

    def code_tensors(self) -> dict[str, Tensor]:
        """What decides codes after the latents, by name: the codebook, and what a quantizer compares latents with besides."""
        return {"codebook": self.codebook}

    def set_step(self, step: int, total: int) -> dict[str, float]:
        """Tell the model which of `total` training steps comes next -> the values of its own schedules, for the log."""
        return {}

    def take_restarts(self) -> int:
        """Dead codes that were restarted since this was last asked."""
        return 0

    def take_rewritten(self) -> list[nn.Parameter]:
        """Parameters changed in place since this was last asked; an optimizer with copies must take them over."""
        return []

    # ---- what users call

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Image [B, 3, S, S] in [-1, 1] -> codes [B, h, w] int64 in [0, K). Never changes the codebook.

        UserError on another shape or on integers. Call `.eval()` first if the config has dropout.
        """
        self.config.check_encodes()
        self._check_image(image)
        return self.codes_of(self.latents(_fast_layout(image, self.config.resolution)))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] in [0, K) -> image [B, 3, S, S] in [-1, 1]. UserError on another range, dtype or grid."""
        self._check_codes(codes)
        return self.decode_vectors(_fast_layout(self.lookup(codes.long()), self.config.resolution)).clamp(-1.0, 1.0)

    def forward(self, image: Tensor) -> Reconstruction:
        """Image [B, 3, S, S] in [-1, 1] -> reconstruction with gradients. The codebook learns in training mode.

        After `freeze_codes` only the way from codes to pixels has gradients, and there are no loss parts.
        """
        self.config.check_encodes()
        self._check_image(image)
        if not self.codes_frozen:
            return self.reconstruct(image)
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            codes = self.codes_of(self.latents(image.float()))
            vectors = self.lookup(codes)
        return Reconstruction(self.decode_vectors(vectors), codes, {})

    def freeze_codes(self) -> Self:
        """Train the decoder alone from here on: what decides codes takes no gradient, and stays in eval mode."""
        self.codes_frozen = True
        for name in self.code_parts:
            self.get_submodule(name).requires_grad_(False).eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Frozen parts follow `.to(device)` but not `.bfloat16()`: rounded weights would be another encoder."""
        frozen = [self.get_submodule(name) for name in self.code_parts] if self.codes_frozen else []
        kept = {id(tensor) for part in frozen for tensor in [*part.parameters(), *part.buffers()]}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in kept and tensor.is_floating_point() else moved

        return super()._apply(keep_dtype, recurse)

    def train(self, mode: bool = True) -> Self:
        """Training mode; frozen parts stay in eval mode, or a codebook would go on learning."""
        super().train(mode)
        if mode and self.codes_frozen:
            for name in self.code_parts:
                self.get_submodule(name).eval()
        return self

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training keeps only some activations and computes the others again: less memory, more time."""
        return any(module.checkpointing for module in self.modules() if isinstance(module, Checkpointed))

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        for module in self.modules():
            if isinstance(module, Checkpointed):
                module.checkpointing = on

    def _check_image(self, image: Tensor) -> None:
        side = self.config.resolution
        expected = (self.config.in_channels, side, side)
        if image.ndim != 4 or tuple(image.shape[1:]) != expected:
            raise UserError(f"expected an image [B, {', '.join(map(str, expected))}], got {list(image.shape)}; resize it with "
                            "tokenizer_image.images.image_to_pixels, or use tokenizer_image.tiling for a large picture")
        if not image.is_floating_point():
            raise UserError(f"expected a float image in [-1, 1], got {image.dtype}; "
                            "convert it with tokenizer_image.images.pixels_to_float")

    def _check_codes(self, codes: Tensor) -> None:
        if codes.dtype == torch.bool or codes.is_floating_point() or codes.is_complex():
            raise UserError(f"expected integer codes, got {codes.dtype}")
        if codes.ndim != 3 or tuple(codes.shape[1:]) != self.grid:
            raise UserError(f"expected codes [B, {self.grid[0]}, {self.grid[1]}], got {list(codes.shape)}; "
                            "fold tokens with tokenizer_image.grid.tokens_to_codes")
        if codes.numel():
            low, high = (int(bound) for bound in torch.aminmax(codes))
            if low < 0 or high >= self.codebook_size:
                raise UserError(f"code {low if low < 0 else high} is outside the codebook: "
                                f"valid codes are 0 to {self.codebook_size - 1}")


def _fast_layout(features: Tensor, resolution: int) -> Tensor:
    """Features [B, ...] of B pictures in the memory layout that their convolutions are fastest in; the values are the same.

    On a CPU, channels-last took 0.86 to 0.93 of the time for four pictures of 128 px and 1.1 to 1.4 of it for one of 64 px
    (VQGAN f16-1024, one and two threads): there the weights, whose layout has to follow, are most of the traffic.
    """
    few = features.device.type == "cpu" and len(features) * resolution**2 < CHANNELS_LAST_PIXELS
    return features.contiguous(memory_format=torch.contiguous_format if few else torch.channels_last)
