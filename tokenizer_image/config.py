"""Config base of all image tokenizers; config and published sizes of the CNN VQGAN."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from tokenizer_image.quantizer_config import Fraction, Positive, QuantizerConfig
from tokenloom_common.config import StrictConfig
from tokenloom_common.errors import UserError


class ImageTokenizerConfig(StrictConfig):
    """Settings that every family of image tokenizers has."""

    kind: str
    """Family: a name in tokenizer_image.IMAGE_TOKENIZERS."""
    resolution: Positive = 256
    """Side of the square image in pixels; larger images go in tiles (tokenizer_image/tiling.py)."""
    in_channels: Positive = 3
    codebook_size: int = Field(default=16384, ge=2)

    @property
    def downsampling(self) -> int:
        """Pixels along one side of a code's cell: the f in f16."""
        raise NotImplementedError

    @property
    def depth(self) -> int:
        """Codes per position: more than 1 with a residual quantizer only."""
        return 1

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the codes; w includes a factor `depth`, since a position's codes are adjacent.
        """
        side = self.resolution // self.downsampling
        return (side, side * self.depth)

    @property
    def num_tokens(self) -> int:
        """N = h*w."""
        height, width = self.grid
        return height * width

    def check_encodes(self, where: str = "this image tokenizer") -> None:
        """Raise UserError if the tokenizer, which `where` names, can only decode.

        Call it before anything slow.
        """


class QuantizedConfig(ImageTokenizerConfig):
    """Config of a family with a quantizer between encoder and decoder."""

    embed_dim: Positive = 8
    """Length of a code vector."""
    quantizer: QuantizerConfig = QuantizerConfig()

    @property
    def depth(self) -> int:
        """Codes per position: more than 1 with a residual quantizer only."""
        return self.quantizer.depth


class VQGANConfig(QuantizedConfig):
    """A CNN VQGAN (Esser et al. 2021, arXiv 2012.09841), in the blocks of its checkpoints."""

    kind: Literal["vqgan"] = "vqgan"
    channels: Positive = 128
    """Width of the first level."""
    channel_multipliers: tuple[Positive, ...] = Field(default=(1, 1, 2, 2, 4), min_length=1)
    """One entry per level; each level after the first halves the resolution."""
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
    """Width of the decoder's first level; none = `channels`.
    A larger decoder can be trained against frozen codes."""
    decoder_res_blocks: Positive | None = None
    """Residual blocks per level of the decoder, before its extra one; none = `num_res_blocks`."""
    input_range: Literal["signed", "unit"] = "signed"
    """Pixel range that the encoder's weights expect: [-1, 1], or [0, 1] as VQGAN-jax was trained
    (dalle-mini). Images passed in are in [-1, 1] either way."""
    output_range: Literal["signed", "unit"] = "signed"
    """Pixel range that the decoder's weights give: [-1, 1], or [0, 1] (VQGAN-jax, min-dalle).
    Images returned are in [-1, 1] either way."""
    has_encoder: bool = True
    """False: a detokenizer, which only decodes (min-dalle publishes no more than that)."""

    @property
    def downsampling(self) -> int:
        """Pixels along one side of a code's cell: the f in f16."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def level_resolutions(self) -> tuple[int, ...]:
        """Resolution of each level, from the image's down to the code grid's."""
        levels = range(len(self.channel_multipliers))
        return tuple(self.resolution // 2**level for level in levels)

    def check_encodes(self, where: str = "this image tokenizer") -> None:
        """Raise UserError without an encoder."""
        if not self.has_encoder:
            raise UserError(
                f"{where} has no encoder (has_encoder is false in its config), so it can only turn "
                "codes into pictures; to encode or train, convert the whole VQGAN that it is a "
                "part of")

    @model_validator(mode="after")
    def _validate(self) -> Self:
        if self.resolution % self.downsampling:
            raise ValueError(
                f"resolution {self.resolution} is not divisible by {self.downsampling} "
                f"({len(self.channel_multipliers)} channel_multipliers); "
                f"use {nearest_multiple(self.resolution, self.downsampling)}")

        self._check_norm_groups("channels", self.channels)
        self._check_norm_groups("decoder_channels", self.decoder_channels or self.channels)

        for resolution in self.attention_resolutions:
            if resolution not in self.level_resolutions:
                raise ValueError(
                    f"attention_resolutions {resolution} is no level's resolution; "
                    f"the levels have {', '.join(map(str, self.level_resolutions))}")

        if self.input_range != "signed" and not self.has_encoder:
            raise ValueError(f"input_range '{self.input_range}' is for an encoder, and has_encoder "
                             "is false; leave it out")
        self.quantizer.check_sizes(self.embed_dim, self.codebook_size)
        return self

    def _check_norm_groups(self, name: str, channels: int) -> None:
        """Raise ValueError unless GroupNorm divides the width of every level."""
        for multiplier in sorted({1, *self.channel_multipliers}):  # 1: conv_in
            if (channels * multiplier) % self.norm_groups:
                raise ValueError(
                    f"{name} {channels} x multiplier {multiplier} is not divisible by "
                    f"norm_groups {self.norm_groups}; use a multiple of {self.norm_groups}, "
                    "or fewer norm_groups")


def nearest_multiple(value: int, step: int) -> int:
    """Return the multiple of `step` nearest to `value`, at least `step`: the remedy in an error."""
    return max(1, round(value / step)) * step


# The released checkpoints learned their codes by gradient, from a random start, without restarts.
AS_RELEASED: dict[str, Any] = {
    "learn_codebook_by_gradient": True, "kmeans_init": False, "rotation_trick": False,
    "dead_code_fraction": 0.0}
_TAMING = QuantizerConfig(l2_normalize=False, **AS_RELEASED)
_LLAMAGEN = QuantizerConfig(**AS_RELEASED)
_GUMBEL = QuantizerConfig(
    kind="gumbel", kl_weight=1e-8, temperature_start=0.9, temperature_end=1e-6,
    temperature_steps=1_000_001)

VQGAN_PRESETS: dict[str, VQGANConfig] = {
    "debug": VQGANConfig(
        resolution=16, channels=16, channel_multipliers=(1, 2), num_res_blocks=1,
        attention_resolutions=(), norm_groups=8, z_channels=16, codebook_size=64),
    "vqgan-f16-1024": VQGANConfig(embed_dim=256, codebook_size=1024, quantizer=_TAMING),
    "vqgan-f16-16384": VQGANConfig(embed_dim=256, codebook_size=16384, quantizer=_TAMING),
    # LlamaGen, arXiv 2406.06525
    "vq-16": VQGANConfig(quantizer=_LLAMAGEN),
    "vq-8": VQGANConfig(
        channel_multipliers=(1, 2, 2, 4), attention_resolutions=(32,), quantizer=_LLAMAGEN),
    # taming's vqgan_gumbel_f8
    "vqgan-f8-gumbel": VQGANConfig(
        channel_multipliers=(1, 1, 2, 4), attention_resolutions=(32,), embed_dim=256,
        codebook_size=8192, quantizer=_GUMBEL),
}
