"""The families of image tokenizers by name, their presets, and loading a folder whichever family it holds."""

from __future__ import annotations

from pathlib import Path

import torch

from tokenizer_image.config import VQGAN_PRESETS, ImageTokenizerConfig
from tokenizer_image.dvae import DVAE, DVAE_PRESETS
from tokenizer_image.image_tokenizer import ImageTokenizer
from tokenizer_image.vit_vqgan import VIT_VQGAN_PRESETS, ViTVQGAN
from tokenizer_image.vqgan import VQGAN
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import MissingFileError, choose
from tokenloom_common.pretrained import resolve_folder

IMAGE_TOKENIZERS: dict[str, type[ImageTokenizer]] = {kind.kind: kind for kind in (VQGAN, ViTVQGAN, DVAE)}
PRESETS: dict[str, tuple[str, ImageTokenizerConfig]] = {
    **{name: (VQGAN.kind, config) for name, config in VQGAN_PRESETS.items()},
    **{name: (ViTVQGAN.kind, config) for name, config in VIT_VQGAN_PRESETS.items()},
    **{name: (DVAE.kind, config) for name, config in DVAE_PRESETS.items()}}
"""Preset -> kind and config."""


def preset(name: str) -> ImageTokenizerConfig:
    """The config of a preset. UserError that lists the names."""
    return choose(PRESETS, name, "tokenizer preset")[1]


def build_tokenizer(config: ImageTokenizerConfig) -> ImageTokenizer:
    """An untrained tokenizer of the family that the config belongs to."""
    return IMAGE_TOKENIZERS[config.kind](config)


def load_tokenizer(folder: str | Path, device: str | torch.device = "cpu", revision: str | None = None) -> ImageTokenizer:
    """The image tokenizer of a local folder or hub id, strictly, in eval mode, of whatever kind its config.json names.

    revision: of a hub id: branch, tag or commit.
    """
    path = resolve_folder(folder, revision)
    config = path / "config.json"
    if not config.is_file():
        raise MissingFileError(f"{folder}: config.json is missing, so the folder is not a (whole) image tokenizer")
    kind = choose(IMAGE_TOKENIZERS, str(read_mapping(config).get("kind")), f"{config}: kind of image tokenizer")
    return kind.from_pretrained(path, device)
