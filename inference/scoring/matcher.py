"""The matcher: a small contrastive image-text model that is trained here, as CLIP is.

A CNN embeds the image, the caption encoder of our transformers embeds the caption, and their cosine
similarity is the score. Trained with `training/train_matcher.py` on the contrastive objective of
Radford et al. 2021 (https://arxiv.org/abs/2103.00020), but far smaller than the published models in
size, data and reach.
"""

# Axes: B batch, S side in pixels, C channels, T text positions, D width of the text tower, E width
#       of the shared space

from __future__ import annotations

import math
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from seq2seq.config import LayersConfig
from seq2seq.text_encoder import TextEncoder
from tokenizer_image.layers import ResBlock, group_norm
from tokenloom_common.config import StrictConfig
from tokenloom_common.pretrained import PretrainedModule

FIRST_SCALE = math.log(1 / 0.07)  # log of the first 1 / temperature: CLIP, section 2.5
MAX_SCALE = math.log(100)  # "clipped to prevent scaling the logits by more than 100", ibid.


class ImageTowerConfig(StrictConfig):
    """The CNN over images: it halves the side at the stem and before every stage but the first."""

    resolution: int = Field(
        64, ge=8, le=1024, description="S: side of the pictures in pixels; others are resized")
    channels: int = Field(32, ge=4, le=4096, description="C: width of the first stage")
    channel_multipliers: tuple[int, ...] = Field(
        (1, 2, 4, 8), min_length=1, max_length=8, description="width of each stage / C")
    num_res_blocks: int = Field(1, ge=1, le=64, description="residual blocks a stage")
    norm_groups: int = Field(8, ge=1, le=256, description="groups of the group normalisations")

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        smallest = 1 << len(self.channel_multipliers)
        if self.resolution % smallest:
            stages = len(self.channel_multipliers)
            raise ValueError(
                f"resolution {self.resolution} cannot be halved once for each of {stages} "
                f"stages; use a multiple of {smallest}, or fewer channel_multipliers")
        for multiplier in self.channel_multipliers:
            if multiplier < 1 or self.channels * multiplier % self.norm_groups:
                raise ValueError(f"channels {self.channels} x {multiplier} must be a positive "
                                 f"multiple of norm_groups {self.norm_groups}")
        return self


class TextTowerConfig(LayersConfig):
    """The caption encoder: as in an encoder-decoder transformer, so that it can start from one."""

    layers: int = Field(
        4, ge=0, le=512, description="of the text tower; 0 only with text features")

    @model_validator(mode="after")
    def _check_tower(self) -> Self:
        if self.layers == 0 and self.text_feature_width is None:
            raise ValueError("layers 0 leaves the caption's words without their neighbours; "
                             "use 1 or more, or the features of a frozen text encoder")
        return self


class MatcherConfig(StrictConfig):
    """Two towers and their shared space."""

    image: ImageTowerConfig = ImageTowerConfig()
    text: TextTowerConfig
    embed_dim: int = Field(
        128, ge=2, le=1 << 14, description="E: width of the space that pictures and captions share")


class ImageTower(nn.Module):
    """Image -> one vector: residual blocks at falling resolution, then the mean over positions."""

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = nn.Conv2d(3, widths[0], 3, stride=2, padding=1)
        stages: list[nn.Module] = []
        incoming = widths[0]
        for width in widths:
            layers: list[nn.Module] = [nn.AvgPool2d(2)] if stages else []
            for _ in range(config.num_res_blocks):
                layers.append(ResBlock(incoming, width, config.norm_groups, dropout=0.0))
                incoming = width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.norm_out = group_norm(widths[-1], config.norm_groups)
        self.width = widths[-1]

    def forward(self, image: Tensor) -> Tensor:
        """Image [B, 3, S, S] in [-1, 1] -> [B, last width]."""
        hidden = self.stages(self.conv_in(image))
        return F.silu(self.norm_out(hidden)).mean(dim=(2, 3))


class Embeddings(NamedTuple):
    """Vectors of length 1 in the shared space, float32: image [B, E], text [B, E]."""

    image: Tensor
    text: Tensor


class Matcher(PretrainedModule):
    """Embed images and captions as unit vectors, whose dot product is their cosine similarity."""

    kind = "matcher"
    config_class = MatcherConfig

    def __init__(self, config: MatcherConfig) -> None:
        super().__init__()
        self.config = config
        self.image_tower = ImageTower(config.image)
        self.text_encoder = TextEncoder(config.text, config.text.layers)
        self.image_projection = nn.Linear(self.image_tower.width, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(config.text.width, config.embed_dim, bias=False)
        # log of 1 / temperature, by CLIP's name; training alone reads it. [1]: DeepSpeed cannot
        # send a scalar
        self.logit_scale = nn.Parameter(torch.full((1,), FIRST_SCALE))
        self._initialise()

    def _initialise(self) -> None:
        """Initialise embeddings and positions with std 0.02, as in the transformers.

        All else keeps torch's default.
        """
        text_input = self.text_encoder.text_input
        for module in text_input.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if text_input.position is not None:
            nn.init.normal_(text_input.position, std=0.02)

    def embed_images(self, image: Tensor) -> Tensor:
        """Image [B, 3, S, S] in [-1, 1] -> [B, E] float32 of length 1.

        ValueError for another size.
        """
        side = self.config.image.resolution
        if image.shape[1:] != (3, side, side):
            raise ValueError(
                f"image is {list(image.shape)}, the matcher reads [B, 3, {side}, {side}]")
        return F.normalize(self.image_projection(self.image_tower(image)).float(), dim=-1)

    def embed_captions(self, text_input: Tensor, text_mask: Tensor) -> Tensor:
        """Text ids [B, T] int64 (or features [B, T, F]) -> [B, E] float32 of length 1.

        text_mask [B, T] bool, True = real.
        """
        memory = self.text_encoder(text_input, text_mask)
        real = text_mask[..., None].to(memory.dtype)
        # mean over what is not padding; clamped, since an empty caption has no real position
        pooled = (memory * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)  # [B, D]
        return F.normalize(self.text_projection(pooled).float(), dim=-1)

    def forward(self, image: Tensor, text_input: Tensor, text_mask: Tensor) -> Embeddings:
        """Run both towers: see embed_images and embed_captions."""
        return Embeddings(self.embed_images(image), self.embed_captions(text_input, text_mask))

    @property
    def scale(self) -> Tensor:
        """1 / temperature, by which training multiplies cosines; scalar float32."""
        return self.logit_scale[0].float().exp()

    @torch.no_grad()
    def clamp_scale(self) -> bool:
        """Clip 1 / temperature to at most 100, as published; return whether that was needed."""
        beyond = bool(self.logit_scale > MAX_SCALE)
        if beyond:
            self.logit_scale.fill_(MAX_SCALE)
        return beyond
