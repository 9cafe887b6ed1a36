"""What every tokenizer's config has, and the config and published sizes of the CNN VQGAN."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from tokenizer_image.quantizer_config import Fraction, Positive, QuantizerConfig
from tokenloom_common.config import StrictConfig
from tokenloom_common.errors import UserError


class ImageTokenizerConfig(StrictConfig):
    """What the config of every family has."""

    kind: str
    """Which family: a name in tokenizer_image.KINDS."""
    resolution: Positive = 256
    """Pixels of a side; larger pictures go in tiles (tokenizer_image/tiling.py)."""
    in_channels: Positive = 3
    codebook_size: int = Field(default=16384, ge=2)

    @property
    def downsampling(self) -> int:
        """Pixels along one side of a code's cell: the f in f16."""
        raise NotImplementedError

    @property
    def depth(self) -> int:
        """Codes a position: more than one with a residual quantizer only."""
        return 1

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the codes. The codes of a position follow one another in its row, so w has a factor `depth`."""
        side = self.resolution // self.downsampling
        return (side, side * self.depth)

    @property
    def num_tokens(self) -> int:
        """N = h*w."""
        return self.grid[0] * self.grid[1]

    def check_encodes(self, where: str = "this image tokenizer") -> None:
        """UserError if the tokenizer, which `where` names, only turns codes into pictures. Ask before anything slow."""


class QuantizedConfig(ImageTokenizerConfig):
    """A family with a quantizer between encoder and decoder."""

    embed_dim: Positive = 8
    """Length of a code vector."""
    quantizer: QuantizerConfig = QuantizerConfig()

    @property
    def depth(self) -> int:
        """Codes a position: more than one with a residual quantizer only."""
        return self.quantizer.depth


class VQGANConfig(QuantizedConfig):
    """A CNN VQGAN (Esser et al. 2021, arXiv 2012.09841), in the block structure of its released checkpoints."""

    kind: Literal["vqgan"] = "vqgan"
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
    norm_eps: float = Field(default=1e-6, gt=0, lt=1)
    """Epsilon of every GroupNorm; min-dalle's detokenizer runs with 1e-5."""
    dropout: Fraction = 0.0
    z_channels: Positive = 256
    decoder_channels: Positive | None = None
    """Width of the decoder's first level; none = `channels`. A larger decoder can be trained against frozen codes."""
    decoder_res_blocks: Positive | None = None
    """Residual blocks a level of the decoder, before its extra one; none = `num_res_blocks`."""
    input_range: Literal["signed", "unit"] = "signed"
    """What the encoder's first convolution reads: pixels in [-1, 1], or in [0, 1] as VQGAN-jax was trained (dalle-mini).
    Pictures given to this class are in [-1, 1] either way."""
    output_range: Literal["signed", "unit"] = "signed"
    """What the decoder's last convolution gives: pixels in [-1, 1], or in [0, 1] (VQGAN-jax, min-dalle). Pictures that this
    class gives are in [-1, 1] either way."""
    has_encoder: bool = True
    """False: a detokenizer, which turns codes into pictures only (min-dalle publishes no more than that)."""

    @property
    def downsampling(self) -> int:
        """Pixels along one side of a code's cell: the f in f16."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def level_resolutions(self) -> tuple[int, ...]:
        """The resolution of each level, from the picture's down to the code grid's."""
        return tuple(self.resolution // 2**level for level in range(len(self.channel_multipliers)))

    def check_encodes(self, where: str = "this image tokenizer") -> None:
        """UserError without an encoder."""
        if not self.has_encoder:
            raise UserError(f"{where} has no encoder (has_encoder is false in its config), so it can only turn codes into "
                            "pictures; to encode or train, convert the whole VQGAN that it is a part of")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.resolution % self.downsampling:
            nearest = max(1, round(self.resolution / self.downsampling)) * self.downsampling
            raise ValueError(f"resolution {self.resolution} is not divisible by {self.downsampling} "
                             f"({len(self.channel_multipliers)} channel_multipliers); use {nearest}")
        for name, channels in (("channels", self.channels), ("decoder_channels", self.decoder_channels or self.channels)):
            for multiplier in sorted({1, *self.channel_multipliers}):
                if (channels * multiplier) % self.norm_groups:
                    raise ValueError(f"{name} {channels} x multiplier {multiplier} is not divisible by norm_groups "
                                     f"{self.norm_groups}; use a multiple of {self.norm_groups}, or fewer norm_groups")
        wrong = [side for side in self.attention_resolutions if side not in self.level_resolutions]
        if wrong:
            raise ValueError(f"attention_resolutions {wrong[0]} is no level's resolution; "
                             f"the levels have {', '.join(map(str, self.level_resolutions))}")
        if self.input_range != "signed" and not self.has_encoder:
            raise ValueError(f"input_range '{self.input_range}' is for an encoder, and has_encoder is false; leave it out")
        self.quantizer.check_sizes(self.embed_dim, self.codebook_size)
        return self


# How the released checkpoints learned their codes: by gradient, from a random start, without restarts.
AS_RELEASED: dict[str, Any] = {"learn_codebook_by_gradient": True, "kmeans_init": False, "rotation_trick": False,
                               "dead_code_fraction": 0.0}
_TAMING = QuantizerConfig(l2_normalize=False, **AS_RELEASED)
_LLAMAGEN = QuantizerConfig(**AS_RELEASED)
_GUMBEL = QuantizerConfig(kind="gumbel", kl_weight=1e-8, temperature_start=0.9, temperature_end=1e-6,
                           temperature_steps=1_000_001)

VQGAN_PRESETS: dict[str, VQGANConfig] = {
    "debug": VQGANConfig(resolution=16, channels=16, channel_multipliers=(1, 2), num_res_blocks=1,
                         attention_resolutions=(), norm_groups=8, z_channels=16, codebook_size=64),
    "vqgan-f16-1024": VQGANConfig(embed_dim=256, codebook_size=1024, quantizer=_TAMING),
    "vqgan-f16-16384": VQGANConfig(embed_dim=256, codebook_size=16384, quantizer=_TAMING),
    "vq-16": VQGANConfig(quantizer=_LLAMAGEN),  # LlamaGen, arXiv 2406.06525
    "vq-8": VQGANConfig(channel_multipliers=(1, 2, 2, 4), attention_resolutions=(32,), quantizer=_LLAMAGEN),
    "vqgan-f8-gumbel": VQGANConfig(channel_multipliers=(1, 1, 2, 4), attention_resolutions=(32,), embed_dim=256,
                                   codebook_size=8192, quantizer=_GUMBEL),  # taming's vqgan_gumbel_f8
}
