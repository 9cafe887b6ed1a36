"""How well a tokenizer keeps a picture."""

# Axes: B batch, H W pixels

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor

from tokenizer_image import VQGAN, CodebookUsage
from tokenizer_image.images import float_to_pixels, image_to_pixels, pixels_to_float
from tokenloom_common.errors import DataError
from tokenloom_common.progress import progress
from training.data.sources import BAD_ITEM_ERRORS, CaptionedImages

PERFECT_DB = 100.0  # PSNR of equal pictures, where the formula gives infinity


def psnr(pixels: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [B] in dB of uint8 pixels [B, H, W, 3]: 10 log10(255^2 / mean squared error), at most 100."""
    error = (pixels.double() - other.double()).square().flatten(1).mean(dim=1)  # [B]
    return (10 * torch.log10(255.0**2 / error)).clamp(max=PERFECT_DB)


def evaluate_reconstruction(tokenizer: VQGAN, source: CaptionedImages, batch_size: int = 64) -> dict[str, Any]:
    """Mean PSNR over pictures (8-bit RGB, at the tokenizer's resolution) and the share of codes that they use."""
    device = next(tokenizer.parameters()).device
    usage = CodebookUsage(tokenizer.codebook_size, window=-(-max(1, len(source)) // batch_size))
    values, unusable = [], 0
    for start in progress(range(0, len(source), batch_size), "measure reconstruction", unit="batch"):
        pixels = []
        for row in range(start, min(start + batch_size, len(source))):
            try:
                pixels.append(image_to_pixels(source[row].image, tokenizer.config.resolution))
            except BAD_ITEM_ERRORS:
                unusable += 1
        if not pixels:
            continue
        original = torch.from_numpy(numpy.stack(pixels))
        codes = tokenizer.encode(pixels_to_float(original).to(device))
        usage.update(codes)
        values.append(psnr(float_to_pixels(tokenizer.decode(codes)).cpu(), original))
    if not values:
        raise DataError("no usable picture to measure reconstruction on")
    report = usage.compute()
    return {"psnr": float(torch.cat(values).mean()), "pictures": sum(len(v) for v in values), "unusable": unusable,
            "codebook_usage": report.usage, "codebook_perplexity": report.perplexity}
