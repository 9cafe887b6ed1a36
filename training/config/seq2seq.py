"""Config of training/train_seq2seq.py."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from seq2seq import ClassLabels, FrozenTextEncoder
from seq2seq.losses import TokenLossConfig
from training.config.run import DataConfig, RunConfig
from training.config.start_folders import with_start
from training.config.text import TextConfig
from training.config.transformer import TransformerSection, read_settings, with_family


class TokenDataConfig(DataConfig):
    """Token shards made by encode_dataset, or captioned images that are encoded during training."""

    path: str = Field(description="folder that encode_dataset wrote; "
                                  "captioned pictures with on_the_fly")
    split: str = Field("train", description="which split of the data")  # shards have named splits
    on_the_fly: bool = Field(
        False, description="path holds captioned pictures: encode them when they are read, with "
                           "every augmentation anew, instead of once with encode_dataset")
    shuffle_rows: int | None = Field(
        None, ge=1, description="rows shuffled together; none = 1048576 of token shards, 4096 of "
                                "streams, all of other pictures")

    @model_validator(mode="after")
    def _check_shuffle_rows(self) -> Self:
        """Refuse options that are about images where token shards are read.

        Replaces DataConfig's check by its name: token shards read shuffle_rows without streaming.
        """
        if self.on_the_fly:
            if self.shuffle_rows is not None and not self.streaming:
                raise ValueError("data.shuffle_rows is for token shards and for data.streaming "
                                 "true; without them all rows are shuffled together")
            return self

        for name in ("caption_column", "image_column", "max_bad_fraction", "streaming",
                     "horizontal_flip"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"data.{name} is for pictures, with data.on_the_fly true; token "
                                 "shards have it from encode_dataset")
        return self


class Seq2SeqTextConfig(TextConfig):
    """Text options of a caption -> token transformer."""

    start_from: str | None = Field(
        None, description="folder of a matcher (RUN/model of train_matcher): its text tokenizer is "
                          "read with, and its text encoder's weights are where the model's own "
                          "starts (Parti)")

    @model_validator(mode="after")
    def _check_start(self) -> Seq2SeqTextConfig:
        if self.start_from is None:
            return self
        if self.kind == "classes":
            raise ValueError("text.start_from is a text encoder, and text.kind classes reads no "
                             "text; leave it out")
        if self.tokenizer or self.vocab_size or self.text_length:
            raise ValueError("text.start_from brings its text tokenizer, vocab_size and "
                             "text_length; leave text.tokenizer, text.vocab_size and "
                             "text.text_length out")
        return self


class Seq2SeqRunConfig(RunConfig):
    """training/train_seq2seq.py: token shards -> the model folder of a transformer."""

    data: TokenDataConfig
    init_from: str | None = Field(
        None, description="folder or hub id of a trained or converted model: its weights are where "
                          "this one starts; model.*, text.* and image_tokenizer are taken from "
                          "there")
    image_tokenizer: str | None = Field(
        None, description="folder of the image tokenizer that made the tokens; none = the one of "
                          "init_from's model folder")
    text: Seq2SeqTextConfig = Seq2SeqTextConfig()
    # a factory: defaults skip the validators, which fill in the family that a union needs
    model: TransformerSection = Field(default_factory=lambda: read_settings({}))
    loss: TokenLossConfig = TokenLossConfig()
    code_tables_from_codebook: bool = Field(
        False, description="begin the input and output table of image codes as a random projection "
                           "of the code vectors instead of noise, so that like codes begin alike")
    use_layout: bool = Field(
        True, description="learn the layout before the image, where the token shards have one")
    caption_dropout: float = Field(
        0.1, ge=0, lt=1, description="chance that a caption is replaced by the null caption")
    token_corruption: float = Field(
        0.0, ge=0, lt=1, description="share of the tokens fed to the decoder that are replaced by "
                                     "random codes, so that it keeps listening to the caption")
    sample_guidance: float = Field(
        3.0, ge=0, le=100, description="guidance scale of the sample grids "
                                       "and the exported default")
    sample_temperature: float = Field(
        1.0, ge=0, le=100, description="temperature of the sample grids and the exported default")
    sample_top_k: int = Field(
        256, ge=0, description="top-k of the sample grids and the exported default; 0 = off")

    @model_validator(mode="before")
    @classmethod
    def _take_model_from_start(cls, values: Any) -> Any:
        """Use init_from's model and text input where the recipe does not describe them."""
        if not isinstance(values, dict) or values.get("init_from") is None:
            return values
        return with_start(values)

    @field_validator("model", mode="before")
    @classmethod
    def _fill_in_family(cls, values: Any) -> Any:
        # before the union is read, since pydantic chooses a family by `kind`
        return with_family(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check_text_prediction(self) -> Seq2SeqRunConfig:
        # an encoder-decoder has no such field: its encoder sees the whole caption
        predicts = bool(self.model.resolved().get("predict_text", False))
        if predicts and not self.loss.text_weight:
            remedy = "set both or neither"
            if self.init_from:  # the model is given, so only the weight can change
                remedy = "give the text a weight (DALL-E: 0.125)"
            raise ValueError(f"model.predict_text is true, but loss.text_weight is 0; {remedy}")
        if self.loss.text_weight and not predicts:
            raise ValueError(f"loss.text_weight is {self.loss.text_weight}, but model.predict_text "
                             "is false; set both or neither")
        if predicts and self.text.kind in (ClassLabels.kind, FrozenTextEncoder.kind):
            raise ValueError("model.predict_text needs text ids to predict; "
                             f"text.kind {self.text.kind} has none")
        return self

    @model_validator(mode="after")
    def _check_possible(self) -> Seq2SeqRunConfig:
        if self.init_from is None and self.image_tokenizer is None:
            raise ValueError("missing key 'image_tokenizer'")  # worded like any required key's
        if self.init_from is not None and self.code_tables_from_codebook:
            raise ValueError("init_from brings the tables of codes; leave "
                             "code_tables_from_codebook out")
        if self.init_from is not None and self.text.start_from is not None:
            raise ValueError("init_from brings the whole model, the text encoder of "
                             "text.start_from too; leave one of them out")
        if self.train.weight_ema and self.deepspeed.zero_stage == 3:
            raise ValueError("train.weight_ema follows whole weights, which deepspeed.zero_stage 3 "
                             "shards; use stage 2 or less")
        self.text.check_workers(self.data.workers)
        return self
