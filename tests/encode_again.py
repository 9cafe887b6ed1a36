"""Tokens of one picture of a data set, made anew without encode_dataset."""

from __future__ import annotations

from pathlib import Path

import torch

from tokenizer_image import VQGAN
from tokenizer_image.images import image_to_pixels, pixels_to_float
from training.data.sources.open_dataset import open_dataset


def tokens_of_row(tokenizer: VQGAN, data: Path, row: int) -> list[int]:
    """Image tokens of a row of the train split."""
    pixels = image_to_pixels(open_dataset(str(data), split="train")[row].image, tokenizer.config.resolution)
    return tokenizer.encode(pixels_to_float(torch.from_numpy(pixels)[None])).flatten().tolist()
