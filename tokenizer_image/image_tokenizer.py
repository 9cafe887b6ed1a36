"""Contract of every image tokenizer: image <-> grid of codes.

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
"""Pixels in a batch from which channels-last convolutions are faster on a CPU."""


class Reconstruction(NamedTuple):
    """Result of a training forward."""

    reconstruction: Tensor
    """[B, 3, S, S], unclamped."""
    codes: Tensor
    """[B, h, w] int64."""
    losses: dict[str, LossPart]
    """The model's own loss terms by name."""


class ImageTokenizer(PretrainedModule):
    """`encode` and `decode` are for use, `forward` is for training; subclasses give the parts."""

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

    # ---- to be implemented by each family

    @abstractmethod
    def latents(self, image: Tensor) -> Tensor:
        """Image [B, 3, S, S] -> latents [B, D, h, w/depth], before quantizing."""

    @abstractmethod
    def codes_of(self, latents: Tensor) -> Tensor:
        """Latents -> codes [B, h, w] int64 in [0, K); changes nothing."""

    @abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] in [0, K) -> code vectors [B, D, h, w/depth], in the decoder's dtype."""

    @abstractmethod
    def decode_vectors(self, vectors: Tensor) -> Tensor:
        """Code vectors [B, D, h, w/depth] -> image [B, 3, S, S], unclamped, with gradients."""

    @abstractmethod
    def reconstruct(self, image: Tensor) -> Reconstruction:
        """Forward of a training step, with gradients everywhere; a codebook may learn from it."""

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """All code vectors [K, D] float32, or [depth*K, D] with a residual quantizer."""

    @property
    @abstractmethod
    def last_layer(self) -> Tensor:
        """The weight at which an adaptive adversarial loss compares gradients."""

    def code_settings(self) -> dict[str, Any]:
        """JSON-able settings that decide codes beyond the weights' shapes."""
        return {"kind": self.kind, "resolution": self.config.resolution}

    def code_tensors(self) -> dict[str, Tensor]:
        """Tensors that decide codes after the latents, by name."""
        return {"codebook": self.codebook}

    def code_counts(self) -> Tensor | None:
        """How often each code was found in training, lately [depth, K] float32; None if unknown."""
        return None

    def set_step(self, step: int, total: int) -> dict[str, float]:
        """Set the schedules for training step `step` (from 0) of `total` -> their values."""
        return {}

    def take_restarts(self) -> int:
        """Return the number of dead codes restarted since the last call."""
        return 0

    def take_rewritten(self) -> list[nn.Parameter]:
        """Return the parameters changed in place since the last call.

        An optimizer with master copies must reload them.
        """
        return []

    # ---- for callers

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Image [B, 3, S, S] in [-1, 1] -> codes [B, h, w] int64 in [0, K).

        Never changes the codebook. Call `.eval()` first if the config has dropout. UserError on
        another shape or on integers.
        """
        self.config.check_encodes()
        self._check_image(image)
        image = _to_fastest_layout(image, self.config.resolution)
        return self.codes_of(self.latents(image))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, h, w] in [0, K) -> image [B, 3, S, S] in [-1, 1].

        UserError on another range, dtype or grid.
        """
        self._check_codes(codes)
        vectors = _to_fastest_layout(self.lookup(codes.long()), self.config.resolution)
        return self.decode_vectors(vectors).clamp(-1.0, 1.0)

    def forward(self, image: Tensor) -> Reconstruction:
        """Image [B, 3, S, S] in [-1, 1] -> reconstruction with gradients.

        The codebook learns in training mode. After `freeze_codes` only the path from codes to
        pixels has gradients, and there are no loss terms.
        """
        self.config.check_encodes()
        self._check_image(image)
        if not self.codes_frozen:
            return self.reconstruct(image)

        # in float32 also under autocast, which would round latents to other codes
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            codes = self.codes_of(self.latents(image.float()))
            vectors = self.lookup(codes)
        return Reconstruction(self.decode_vectors(vectors), codes, {})

    # ---- training of the decoder alone

    def freeze_codes(self) -> Self:
        """Stop gradients of everything that decides codes and keep it in eval mode from here on."""
        self.codes_frozen = True
        for part in self._code_modules():
            part.requires_grad_(False).eval()
        return self

    def train(self, mode: bool = True) -> Self:
        """Set training mode; frozen parts stay in eval mode, or a codebook would go on learning."""
        super().train(mode)
        if mode and self.codes_frozen:
            for part in self._code_modules():
                part.eval()
        return self

    def _code_modules(self) -> list[nn.Module]:
        return [self.get_submodule(name) for name in self.code_parts]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply `fn`, but frozen parts ignore `.bfloat16()`: rounded weights give other codes."""
        frozen_ids: set[int] = set()
        if self.codes_frozen:
            for part in self._code_modules():
                frozen_ids.update(id(tensor) for tensor in [*part.parameters(), *part.buffers()])

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in frozen_ids and tensor.is_floating_point():
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_dtype, recurse)

    # ---- gradient checkpointing

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether training recomputes the activations inside blocks: less memory, more time."""
        return any(module.checkpointing for module in self._checkpointed_modules())

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        for module in self._checkpointed_modules():
            module.checkpointing = on

    def _checkpointed_modules(self) -> list[Checkpointed]:
        return [module for module in self.modules() if isinstance(module, Checkpointed)]

    # ---- checks

    def _check_image(self, image: Tensor) -> None:
        side = self.config.resolution
        expected = (self.config.in_channels, side, side)
        if image.ndim != 4 or tuple(image.shape[1:]) != expected:
            raise UserError(
                f"expected an image [B, {', '.join(map(str, expected))}], got {list(image.shape)}; "
                "resize it with tokenizer_image.images.image_to_pixels, or use "
                "tokenizer_image.tiling for a large picture")
        if not image.is_floating_point():
            raise UserError(f"expected a float image in [-1, 1], got {image.dtype}; "
                            "convert it with tokenizer_image.images.pixels_to_float")

    def _check_codes(self, codes: Tensor) -> None:
        if codes.dtype == torch.bool or codes.is_floating_point() or codes.is_complex():
            raise UserError(f"expected integer codes, got {codes.dtype}")
        if codes.ndim != 3 or tuple(codes.shape[1:]) != self.grid:
            height, width = self.grid
            raise UserError(f"expected codes [B, {height}, {width}], got {list(codes.shape)}; "
                            "fold tokens with tokenizer_image.grid.tokens_to_codes")
        code = code_out_of_range(codes, self.codebook_size)
        if code is not None:
            raise UserError(f"code {code} is outside the codebook: "
                            f"valid codes are 0 to {self.codebook_size - 1}")


def code_out_of_range(codes: Tensor, codebook_size: int) -> int | None:
    """Return the lowest code if below 0, else the highest if above codebook_size - 1, else None."""
    if not codes.numel():  # aminmax refuses it
        return None
    low, high = (int(bound) for bound in torch.aminmax(codes))
    if low < 0:
        return low
    return high if high >= codebook_size else None


def _to_fastest_layout(features: Tensor, resolution: int) -> Tensor:
    """Return features [B, ...] of B images in the memory layout that is fastest for convolutions.

    On a CPU, channels-last took 0.86 to 0.93 of the time for four images of 128 px, and 1.1 to 1.4
    of it for one of 64 px (VQGAN f16-1024, one and two threads): there most of the traffic is the
    weights, whose layout has to follow.
    """
    pixels = len(features) * resolution**2
    if features.device.type == "cpu" and pixels < CHANNELS_LAST_PIXELS:
        return features.contiguous(memory_format=torch.contiguous_format)
    return features.contiguous(memory_format=torch.channels_last)
