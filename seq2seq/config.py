"""Configs of the caption -> image token transformers: fields of both families, and of each one."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from seq2seq.attention import PATTERNS
from tokenloom_common.config import StrictConfig
from tokenloom_common.errors import nearest_name

MAX_TOKENS = 1 << 16  # a grid of 256 x 256
DERIVED = ("text_vocab_size", "text_feature_width", "text_length", "codebook_size", "grid",
           "layout_kind", "layout_classes", "layout_grid", "tokenizer_fingerprint")
"""Fields that follow from the tokenizers and the data; everything else is the user's to choose."""


class LayersConfig(StrictConfig):
    """Transformer layers and their text input: all that a text encoder on its own needs, too."""

    # text input: exactly one of ids and features
    text_vocab_size: int | None = Field(
        None, ge=2, description="entries of the text tokenizer; none with text features")
    text_feature_width: int | None = Field(
        None, ge=1, description="width of a frozen text encoder's features; none with ids")
    text_length: int = Field(
        ge=1, le=4096, description="T: text ids (or features) per caption, padded or truncated")
    text_projection: Literal["linear", "mlp"] = Field(
        "linear", description="of text features: one matrix, or two with a GELU between (LlamaGen)")

    width: int = Field(256, ge=8, le=1 << 16, description="D: width of the residual stream")
    heads: int = Field(4, ge=1, le=1024)
    head_dim: int = Field(64, ge=4, le=1024)
    kv_heads: int | None = Field(
        None, ge=1, description="key/value heads (grouped-query attention); none = heads")
    feedforward: Literal["swiglu", "geglu", "gelu"] = "swiglu"
    feedforward_multiplier: float = Field(
        8 / 3, gt=0, le=16, description="inner width / width (SwiGLU: 2/3 of 4)")
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_placement: Literal["pre", "sandwich", "normformer"] = Field(
        "pre", description="sandwich: also after each block (CogView, ruDALL-E); normformer: also "
        "after attention and inside the feed-forward (Shleifer et al. 2021, DALL-E mini)")
    norm_eps: float | None = Field(
        None, gt=0, le=0.1, description="added to the variance or mean square under the root; "
        "none: nothing in rmsnorm, 1e-5 in layernorm (x-transformers). LlamaGen, BART: 1e-5")
    norm_bias: bool = Field(False, description="a bias in each layernorm (BART)")
    embedding_norm: bool = Field(False, description="normalise embeddings (BART, DALL-E mini)")
    attention_bias: bool = Field(
        False, description="bias in the attention's projections (GPT-2, minDALL-E)")
    feedforward_bias: bool = Field(True, description="bias in the feed-forward")
    qk_norm: bool = Field(
        True, description="RMS-normalise queries and keys per head (Dehghani et al. 2023)")
    rotary: Literal["2d", "1d", "none"] = Field(
        "2d", description="rotary positions of the image tokens; the text uses 1d unless 'none'")
    learned_positions: bool = Field(
        True, description="add learned text and image position embeddings")
    dropout: float = Field(0.0, ge=0, lt=1, description="in attention and feed-forward")

    @property
    def plain_norms(self) -> bool:
        """Whether norms are PyTorch's: x-transformers' have no choice of epsilon and no bias."""
        return self.norm_eps is not None or self.norm_bias

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if (self.text_vocab_size is None) == (self.text_feature_width is None):
            raise ValueError("give one of text_vocab_size (text ids) and text_feature_width (a "
                             "frozen text encoder's features)")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads {self.kv_heads} must divide heads {self.heads}")

        # each axis rotates pairs of numbers
        if self.rotary == "2d" and self.head_dim % 4:
            raise ValueError(f"head_dim {self.head_dim} must be a multiple of 4 for rotary: 2d "
                             "(two axes, two parts each)")
        if self.rotary == "1d" and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even for rotary: 1d")
        if self.rotary == "none" and not self.learned_positions:
            raise ValueError("rotary: none needs learned_positions: true, or the model cannot tell "
                             "positions apart")

        if self.norm_bias and self.norm == "rmsnorm":
            raise ValueError("norm_bias: true needs norm: layernorm; an rmsnorm has no bias")
        return self


class TransformerConfig(LayersConfig):
    """Fields of every transformer over image tokens.

    The output layer has `codebook_size` entries: begin of image is an input, never a prediction.
    """

    kind: ClassVar[str] = ""  # not a field: config.json has it beside the fields

    # K and the grid come from the image tokenizer, the layout from the data (DERIVED)
    codebook_size: int = Field(
        ge=2, le=1 << 24, description="K: entries of the image tokenizer's codebook")
    grid: tuple[int, int] = Field(description="(h, w): rows and columns of the code grid")
    layout_kind: Literal["classes", "colors"] | None = Field(
        None, description="what the layout before the image is made of; none = no layout")
    layout_classes: int | None = Field(
        None, ge=2, le=1 << 16, description="classes of the layout")
    layout_grid: tuple[int, int] | None = Field(None, description="rows and columns of the layout")
    image_positions: Literal["row_column", "flat"] = Field(
        "row_column", description="learned positions: a row's plus a column's (DALL-E), or one per "
        "token (minDALL-E, BART)")
    attention: tuple[str, ...] = Field(
        ("full",), description="pattern of each layer, repeated when there are more layers: "
        f"{', '.join(PATTERNS)}")
    convolution_size: int = Field(
        11, ge=3, description="side of the 'convolution' pattern's neighbourhood; odd")
    last_attention: str | None = Field(
        None, description="pattern of the last layer, where it differs (DALL-E: convolution)")
    tokenizer_fingerprint: str = Field(
        "", description="of the image tokenizer whose codes these tokens are")

    @property
    def num_tokens(self) -> int:
        """N = h * w image tokens per image."""
        return self.grid[0] * self.grid[1]

    @property
    def layout_tokens(self) -> int:
        """L: tokens of the layout; 0 without one."""
        return self.layout_grid[0] * self.layout_grid[1] if self.layout_grid else 0

    def patterns(self, layers: int) -> list[str]:
        """Return the attention pattern of each of `layers` layers."""
        names = [self.attention[layer % len(self.attention)] for layer in range(layers)]
        return [*names[:-1], self.last_attention] if self.last_attention else names

    @model_validator(mode="after")
    def _check(self) -> TransformerConfig:
        for name, grid in (("grid", self.grid), ("layout_grid", self.layout_grid)):
            if grid is not None and (min(grid) < 1 or grid[0] * grid[1] > MAX_TOKENS):
                raise ValueError(f"{name} {grid} must have at least one row and column and at most "
                                 f"{MAX_TOKENS:,} codes")

        # no valid value of the three is false, so that `any` finds those that are given
        layout = (self.layout_kind, self.layout_classes, self.layout_grid)
        if None in layout and any(layout):
            raise ValueError("layout_kind, layout_classes and layout_grid belong together; give "
                             "all or none")
        self._check_patterns()
        return self

    def _check_patterns(self) -> None:
        if not self.attention:
            raise ValueError("attention names no pattern; 'full' is the plain one")
        names = [*self.attention, self.last_attention] if self.last_attention else self.attention
        for name in names:
            if name not in PATTERNS:
                nearest = nearest_name(name, PATTERNS)
                raise ValueError(f"attention: unknown pattern '{name}'{nearest}")
        if self.convolution_size % 2 == 0:
            raise ValueError(f"convolution_size {self.convolution_size} must be odd, so that it "
                             "has a middle")


class Seq2SeqConfig(TransformerConfig):
    """Encoder-decoder transformer (Parti, Yu et al. 2022, https://arxiv.org/abs/2206.10789)."""

    kind: ClassVar[str] = "encoder_decoder"

    encoder_layers: int = Field(
        4, ge=0, le=512, description="of the text; 0 only with text features")
    decoder_layers: int = Field(6, ge=1, le=512)

    @model_validator(mode="after")
    def _check_encoder(self) -> Seq2SeqConfig:
        if self.encoder_layers == 0 and self.text_feature_width is None:
            raise ValueError("encoder_layers 0 leaves text ids without context; use 1 or more, or "
                             "the features of a frozen text encoder")
        return self


class DecoderOnlyConfig(TransformerConfig):
    """Text and image in one sequence: DALL-E, ruDALL-E, minDALL-E, LlamaGen.

    Ramesh et al. 2021, https://arxiv.org/abs/2102.12092; Sun et al. 2024,
    https://arxiv.org/abs/2406.06525.
    """

    kind: ClassVar[str] = "decoder_only"

    layers: int = Field(8, ge=1, le=512)
    predict_text: bool = Field(
        False, description="predict the text ids too (DALL-E), from a begin slot on")
    text_padding: Literal["masked", "learned"] = Field(
        "masked", description="masked: no slot sees padding; learned: padding has an embedding of "
        "its own at each position (DALL-E)")
    text_positions: Literal["seen", "blind"] = Field(
        "seen", description="seen: text takes part in attention; blind: its queries and keys are "
        "zero (LlamaGen), so that the image sees its flat mean")
    begin_of_image: bool = Field(
        True, description="a learned slot between text and image; without it (published models) "
        "the text's last slot predicts the first token")

    @model_validator(mode="after")
    def _check_text(self) -> DecoderOnlyConfig:
        needs_ids = self.predict_text or self.text_padding == "learned"
        if needs_ids and self.text_feature_width is not None:
            raise ValueError("predict_text and text_padding: learned need text ids, not the "
                             "features of a text encoder")
        if self.layout_grid and not self.begin_of_image:
            raise ValueError("a layout needs begin_of_image: true")
        if self.text_positions == "blind" and self.rotary == "none":
            raise ValueError("text_positions: blind is about rotary attention and needs rotary: 2d "
                             "or 1d")
        return self

    @property
    def decoder_layers(self) -> int:
        """`layers`, under the name that both families share."""
        return self.layers
