"""From image tokens to images, whole ones and those that are still drawn."""

# Axes: B images, N image tokens, n tokens drawn so far, h w code grid

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from tokenizer_image import ImageTokenizer
from tokenizer_image.grid import tokens_to_codes
from tokenizer_image.images import float_to_pixels, pixels_to_images
from tokenizer_image.neutral import neutral_tokens
from tokenloom_common.errors import UserError


class PixelDecoder:
    """Decodes image tokens of one image tokenizer, whose neutral tokens it computes once."""

    def __init__(self, image_tokenizer: ImageTokenizer, device: torch.device) -> None:
        self.image_tokenizer = image_tokenizer
        self.device = device
        self._neutral: Tensor | None = None  # [N]

    @torch.inference_mode()
    def decode(self, image_tokens: Tensor) -> list[Image.Image]:
        """image_tokens [B, N] int64 in [0, K) -> B images.

        On the CPU an image's pixels are the same whatever is decoded beside it. UserError for
        another shape, dtype or range.
        """
        if not isinstance(image_tokens, Tensor):
            raise UserError(f"image_tokens must be a tensor, got {type(image_tokens).__name__}")
        image_tokens = image_tokens.to(self.device)
        codes = tokens_to_codes(image_tokens, self.image_tokenizer.grid)  # [B, h, w]
        images: list[Image.Image] = []
        # one by one: kernels round differently for another number of images, and 1 image of 16
        # (demo, 32 px) would differ by a level from the same one decoded alone. A GPU is for
        # batches, and promises no equal bits
        at_once = 1 if codes.device.type == "cpu" else max(len(codes), 1)
        for one in codes.split(at_once):
            images += pixels_to_images(float_to_pixels(self.image_tokenizer.decode(one)))
        return images

    def decode_partial(self, image_tokens: Tensor) -> list[Image.Image]:
        """image_tokens so far [B, n] -> B images; what is not drawn yet is empty."""
        if self._neutral is None:
            self._neutral = neutral_tokens(self.image_tokenizer)
        return self.decode(fill_tokens(image_tokens, self._neutral))


def fill_tokens(image_tokens: Tensor, neutral: Tensor) -> Tensor:
    """Return image_tokens [B, n] as [B, N], filled with those of an empty image [N].

    The image tokenizer only decodes whole grids. neutral: see `tokenizer_image.neutral`.
    """
    missing = neutral[image_tokens.shape[1]:].to(image_tokens.device)
    return torch.cat([image_tokens, missing.expand(len(image_tokens), -1)], dim=1)
