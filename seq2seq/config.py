"""The shape of a caption -> image token transformer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tokenloom_common.config import StrictConfig


class Seq2SeqConfig(StrictConfig):
    """Encoder-decoder transformer (Parti, Yu et al. 2022, https://arxiv.org/abs/2206.10789).

    The output layer has `codebook_size` entries: the begin-of-image slot is an input only, so it cannot be sampled.
    """

    text_vocab_size: int = Field(ge=4, description="entries of the text tokenizer")
    text_length: int = Field(ge=2, le=4096, description="T: text ids per caption, padded or truncated")
    codebook_size: int = Field(ge=2, le=1 << 24, description="K: entries of the image tokenizer's codebook")
    grid: tuple[int, int] = Field(description="(h, w): rows and columns of the code grid")
    width: int = Field(256, ge=8, le=1 << 16, description="D: width of the residual stream")
    heads: int = Field(4, ge=1, le=1024)
    head_dim: int = Field(64, ge=4, le=1024)
    kv_heads: int | None = Field(None, ge=1, description="key/value heads (grouped-query attention); none = heads")
    encoder_layers: int = Field(4, ge=1, le=512)
    decoder_layers: int = Field(6, ge=1, le=512)
    feedforward: Literal["swiglu", "gelu"] = "swiglu"
    feedforward_multiplier: float = Field(8 / 3, gt=0, le=16, description="inner width / width (SwiGLU: 2/3 of 4)")
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    qk_norm: bool = Field(True, description="RMS-normalise queries and keys per head (Dehghani et al. 2023)")
    rotary: Literal["2d", "1d", "none"] = Field("2d", description="rotary positions of the image tokens; "
                                                "the text uses 1d unless 'none'")
    learned_positions: bool = Field(True, description="add learned row, column and text position embeddings")
    dropout: float = Field(0.0, ge=0, lt=1, description="in attention and feed-forward")
    tokenizer_fingerprint: str = Field("", description="of the image tokenizer whose codes these tokens are")

    @property
    def num_tokens(self) -> int:
        """N = h * w image tokens a picture."""
        return self.grid[0] * self.grid[1]

    @model_validator(mode="after")
    def _check(self) -> Seq2SeqConfig:
        if min(self.grid) < 1 or self.num_tokens > 1 << 16:
            raise ValueError(f"grid {self.grid} must have at least one row and column and at most 65,536 codes")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}")
        if self.rotary == "2d" and self.head_dim % 4:
            raise ValueError(f"head_dim {self.head_dim} must be a multiple of 4 for rotary: 2d (two axes, two parts each)")
        if self.rotary == "1d" and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even for rotary: 1d")
        if self.rotary == "none" and not self.learned_positions:
            raise ValueError("rotary: none needs learned_positions: true, or the model cannot tell positions apart")
        return self


PRESETS: dict[str, dict] = {
    "debug": {"width": 64, "heads": 2, "head_dim": 32, "encoder_layers": 1, "decoder_layers": 2},
    "emoji-demo": {"width": 256, "heads": 4, "head_dim": 64, "encoder_layers": 2, "decoder_layers": 4},
    "small": {"width": 512, "heads": 8, "head_dim": 64, "encoder_layers": 6, "decoder_layers": 12, "dropout": 0.1},
}
"""Sizes by name: everything that does not follow from the tokenizers."""
