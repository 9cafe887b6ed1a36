"""Families of image tokenizers by name, their presets, and loading a folder of any family."""

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

IMAGE_TOKENIZERS: dict[str, type[ImageTokenizer]] = {
    VQGAN.kind: VQGAN,
    ViTVQGAN.kind: ViTVQGAN,
    DVAE.kind: DVAE,
}
PRESETS: dict[str, tuple[str, ImageTokenizerConfig]] = {
    name: (config.kind, config)
    for presets in (VQGAN_PRESETS, VIT_VQGAN_PRESETS, DVAE_PRESETS)
    for name, config in presets.items()}
"""Preset -> kind and config."""


def preset(name: str) -> ImageTokenizerConfig:
    """Return the config of a preset. UserError that lists the names otherwise."""
    _, config = choose(PRESETS, name, "tokenizer preset")
    return config


def build_tokenizer(config: ImageTokenizerConfig) -> ImageTokenizer:
    """Build an untrained tokenizer of the config's family."""
    return IMAGE_TOKENIZERS[config.kind](config)


def load_tokenizer(folder: str | Path, device: str | torch.device = "cpu",
                   revision: str | None = None) -> ImageTokenizer:
    """Load the image tokenizer of a local folder or hub id, of the kind its config.json names.

    Strictly, in eval mode. revision: branch, tag or commit of a hub id.
    """
    path = resolve_folder(folder, revision)
    config = path / "config.json"
    if not config.is_file():
        raise MissingFileError(
            f"{folder}: config.json is missing, so the folder is not a (whole) image tokenizer")

    kind = str(read_mapping(config).get("kind"))
    tokenizer_class = choose(IMAGE_TOKENIZERS, kind, f"{config}: kind of image tokenizer")
    return tokenizer_class.from_pretrained(path, device)
