"""A small contrastive image-text model, trained here: how well a caption fits a picture.

A CNN reads the picture, the caption encoder of our transformers reads the caption, and both end in one space, where the cosine
of their angle is the score. Trained with `training/train_matcher.py` on the contrastive objective of Radford et al. 2021
(https://arxiv.org/abs/2103.00020); size, data and reach are nothing like the published models'.
"""

# Axes: B batch, S side in pixels, C channels, T text positions, D width of the text tower, E width of the shared space

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

FIRST_SCALE = math.log(1 / 0.07)  # of the logarithm: CLIP, section 2.5
MAX_SCALE = math.log(100)  # "clipped to prevent scaling the logits by more than 100", same place


class ImageTowerConfig(StrictConfig):
    """The CNN that reads pictures: half the side at the stem and again before every stage but the first."""

    resolution: int = Field(64, ge=8, le=1024, description="S: side of the pictures in pixels; others are resized")
    channels: int = Field(32, ge=4, le=4096, description="C: width of the first stage")
    channel_multipliers: tuple[int, ...] = Field((1, 2, 4, 8), min_length=1, max_length=8,
                                                 description="width of each stage / C")
    num_res_blocks: int = Field(1, ge=1, le=64, description="residual blocks a stage")
    norm_groups: int = Field(8, ge=1, le=256, description="groups of the group normalisations")

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        smallest = 1 << len(self.channel_multipliers)
        if self.resolution % smallest:
            raise ValueError(f"resolution {self.resolution} cannot be halved once for each of {len(self.channel_multipliers)} "
                             f"stages; use a multiple of {smallest}, or fewer channel_multipliers")
        for multiplier in self.channel_multipliers:
            if multiplier < 1 or self.channels * multiplier % self.norm_groups:
                raise ValueError(f"channels {self.channels} x {multiplier} must be a positive multiple of norm_groups "
                                 f"{self.norm_groups}")
        return self


class TextTowerConfig(LayersConfig):
    """The caption encoder: what an encoder-decoder transformer has too, so that one can start from it."""

    layers: int = Field(4, ge=0, le=512, description="of the text tower; 0 only with text features")

    @model_validator(mode="after")
    def _check_tower(self) -> Self:
        if self.layers == 0 and self.text_feature_width is None:
            raise ValueError("layers 0 leaves the caption's words without their neighbours; use 1 or more, or the features "
                             "of a frozen text encoder")
        return self


class MatcherConfig(StrictConfig):
    """Two towers and the space that they share."""

    image: ImageTowerConfig = ImageTowerConfig()
    text: TextTowerConfig
    embed_dim: int = Field(128, ge=2, le=1 << 14, description="E: width of the space that pictures and captions share")


class ImageTower(nn.Module):
    """Picture -> one vector: residual blocks at falling resolution, then the mean over all positions."""

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__()
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        self.conv_in = nn.Conv2d(3, widths[0], 3, stride=2, padding=1)
        stages: list[nn.Module] = []
        for before, width in zip([widths[0], *widths], widths, strict=False):
            blocks = [ResBlock(before if block == 0 else width, width, config.norm_groups, dropout=0.0)
                      for block in range(config.num_res_blocks)]
            stages.append(nn.Sequential(*([nn.AvgPool2d(2)] if stages else []), *blocks))
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
    """Pictures and captions -> vectors of length 1 whose product is the cosine of their angle."""

    kind = "matcher"
    config_class = MatcherConfig

    def __init__(self, config: MatcherConfig) -> None:
        super().__init__()
        self.config = config
        self.image_tower = ImageTower(config.image)
        self.text_encoder = TextEncoder(config.text, config.text.layers)
        self.image_projection = nn.Linear(self.image_tower.width, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(config.text.width, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.full((1,), FIRST_SCALE))  # [1]: DeepSpeed cannot send a scalar
        """Logarithm of 1 / temperature, by the published models' name. Only training reads it."""
        self._initialise()

    def _initialise(self) -> None:
        """Normal 0.02 for embeddings and positions, as in the transformers; all else keeps its own."""
        text_input = self.text_encoder.text_input
        for module in text_input.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if text_input.position is not None:
            nn.init.normal_(text_input.position, std=0.02)

    def embed_images(self, image: Tensor) -> Tensor:
        """Image [B, 3, S, S] in [-1, 1] -> [B, E] float32 of length 1. ValueError for another size."""
        side = self.config.image.resolution
        if image.shape[1:] != (3, side, side):
            raise ValueError(f"image is {list(image.shape)}, the matcher reads [B, 3, {side}, {side}]")
        return F.normalize(self.image_projection(self.image_tower(image)).float(), dim=-1)

    def embed_captions(self, text_input: Tensor, text_mask: Tensor) -> Tensor:
        """Text ids [B, T] int64 (or features [B, T, F]), text_mask [B, T] bool (True = real) -> [B, E] float32 of length 1."""
        memory = self.text_encoder(text_input, text_mask)
        real = text_mask[..., None].to(memory.dtype)
        pooled = (memory * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)  # [B, D]: the mean over what is not padding
        return F.normalize(self.text_projection(pooled).float(), dim=-1)

    def forward(self, image: Tensor, text_input: Tensor, text_mask: Tensor) -> Embeddings:
        """Both towers: see embed_images and embed_captions."""
        return Embeddings(self.embed_images(image), self.embed_captions(text_input, text_mask))

    @property
    def scale(self) -> Tensor:
        """1 / temperature: what training multiplies cosines by, scalar float32."""
        return self.logit_scale[0].float().exp()

    @torch.no_grad()
    def clamp_scale(self) -> bool:
        """Bring 1 / temperature back to at most 100, as published; whether that was needed."""
        beyond = bool(self.logit_scale > MAX_SCALE)
        if beyond:
            self.logit_scale.fill_(MAX_SCALE)
        return beyond
