"""Configs of the image tokenizers, and the presets with published sizes."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from tokenloom_common.config import StrictConfig
from tokenloom_common.errors import choose

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class QuantizerConfig(StrictConfig):
    """How latents become codes, and how the codebook learns."""

    l2_normalize: bool = True
    """Compare directions only: latents and codes lie on the unit sphere (ViT-VQGAN; LlamaGen's default)."""
    commitment_weight: float = Field(default=0.25, ge=0)
    """beta of VQ-VAE, van den Oord et al. 2017, eq. 3: already applied in `commit_loss`."""
    learn_codebook_by_gradient: bool = False
    """False: the codebook follows a moving average of its latents (VQ-VAE-2). True: the optimizer moves it."""
    ema_decay: Fraction = 0.99
    """Decay of the moving averages: of the codes, and of how often each is used."""
    dead_code_fraction: Fraction = 0.03
    """A code used less than this fraction of the mean use is restarted at a latent of the batch. 0 = never."""
    kmeans_init: bool = True
    """Place the codes by k-means over the latents of the first training batch."""
    kmeans_iterations: Positive = 10
    rotation_trick: bool = True
    """Gradients turn with the latent (Fifty et al. 2024, arXiv 2410.06424) instead of straight-through."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.learn_codebook_by_gradient and self.l2_normalize:
            raise ValueError("learn_codebook_by_gradient does not work with l2_normalize; set one of them to false")
        return self


class VQGANConfig(StrictConfig):
    """A CNN VQGAN (Esser et al. 2021, arXiv 2012.09841), in the block structure of its released checkpoints."""

    resolution: Positive = 256
    in_channels: Positive = 3
    channels: Positive = 128
    """Width of the first level."""
    channel_multipliers: tuple[Positive, ...] = Field(default=(1, 1, 2, 2, 4), min_length=1)
    """One entry a level; each level after the first halves the resolution."""
    num_res_blocks: Positive = 2
    attention_resolutions: tuple[Positive, ...] = (16,)
    """Levels with attention, named by their resolution when the input has `resolution`."""
    mid_attention: bool = True
    """Attention between the two middle blocks, at the resolution of the code grid."""
    norm_groups: Positive = 32
    dropout: Fraction = 0.0
    z_channels: Positive = 256
    embed_dim: Positive = 8
    """Length of a code vector."""
    codebook_size: int = Field(default=16384, ge=2)
    quantizer: QuantizerConfig = QuantizerConfig()

    @property
    def downsampling(self) -> int:
        """Pixels along one side of a code's cell: the f in f16."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the codes."""
        side = self.resolution // self.downsampling
        return (side, side)

    @property
    def num_tokens(self) -> int:
        """N = h*w."""
        return self.grid[0] * self.grid[1]

    @property
    def level_resolutions(self) -> tuple[int, ...]:
        """The resolution of each level, from the picture's down to the code grid's."""
        return tuple(self.resolution // 2**level for level in range(len(self.channel_multipliers)))

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.resolution % self.downsampling:
            nearest = max(1, round(self.resolution / self.downsampling)) * self.downsampling
            raise ValueError(f"resolution {self.resolution} is not divisible by {self.downsampling} "
                             f"({len(self.channel_multipliers)} channel_multipliers); use {nearest}")
        for multiplier in sorted({1, *self.channel_multipliers}):
            if (self.channels * multiplier) % self.norm_groups:
                raise ValueError(f"channels {self.channels} x multiplier {multiplier} is not divisible by norm_groups "
                                 f"{self.norm_groups}; use a multiple of {self.norm_groups}, or fewer norm_groups")
        wrong = [side for side in self.attention_resolutions if side not in self.level_resolutions]
        if wrong:
            raise ValueError(f"attention_resolutions {wrong[0]} is no level's resolution; "
                             f"the levels have {', '.join(map(str, self.level_resolutions))}")
        if self.quantizer.l2_normalize and self.embed_dim < 2:
            raise ValueError("embed_dim 1 leaves two directions with quantizer.l2_normalize; use 8, or at least 2")
        return self


# Sizes of the two taming presets: the released f16 configs. Their codebooks are 256 wide and compared by distance.
_TAMING = QuantizerConfig(l2_normalize=False, learn_codebook_by_gradient=True, kmeans_init=False, rotation_trick=False,
                          dead_code_fraction=0.0)

PRESETS: dict[str, VQGANConfig] = {
    "debug": VQGANConfig(resolution=16, channels=16, channel_multipliers=(1, 2), num_res_blocks=1,
                         attention_resolutions=(), norm_groups=8, z_channels=16, codebook_size=64),
    "vqgan-f16-1024": VQGANConfig(embed_dim=256, codebook_size=1024, quantizer=_TAMING),
    "vqgan-f16-16384": VQGANConfig(embed_dim=256, codebook_size=16384, quantizer=_TAMING),
    "vq-16": VQGANConfig(),  # LlamaGen, arXiv 2406.06525
    "vq-8": VQGANConfig(channel_multipliers=(1, 2, 2, 4), attention_resolutions=(32,)),
}


def preset(name: str) -> VQGANConfig:
    """A preset by its name. UserError that lists the names."""
    return choose(PRESETS, name, "tokenizer preset")
