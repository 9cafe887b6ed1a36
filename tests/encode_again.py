"""Encode one image of a data set without encode_dataset."""

from __future__ import annotations

from pathlib import Path

import torch

from tokenizer_image import VQGAN
from tokenizer_image.images import image_to_pixels, pixels_to_float
from training.data.sources.open_dataset import open_dataset


def tokens_of_row(tokenizer: VQGAN, data: Path, row: int) -> list[int]:
    """Return the image tokens of a row of the train split."""
    image = open_dataset(str(data), split="train")[row].image
    pixels = torch.from_numpy(image_to_pixels(image, tokenizer.config.resolution))
    return tokenizer.encode(pixels_to_float(pixels[None])).flatten().tolist()
