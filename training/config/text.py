"""Config of the text source."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from seq2seq import TEXT_SOURCES
from tokenloom_common.config import StrictConfig
from tokenloom_common.errors import choose


class TextConfig(StrictConfig):
    """The model's text input: ids of a text tokenizer, a class, or features of a text encoder.

    One class for all kinds, not a union of one per kind: an option of another kind is then refused
    with the kind that reads it, which says more than "unknown key".
    """

    kind: str = Field(
        "sentencepiece",
        description="sentencepiece: captions as ids; classes: a row's first caption is its class, "
                    "one learned vector each; frozen: features of a pretrained text encoder")
    tokenizer: str | None = Field(
        None, description="folder of a trained text tokenizer (for sentencepiece also of a "
                          "published model's byte-pair encoding); none = train one on the captions")
    vocab_size: int | None = Field(
        None, ge=264, le=1 << 20, description="of the one that is trained; none = 2048")
    text_length: int | None = Field(
        None, ge=2, le=4096, description="ids per caption, the end included; none = 32")
    encoder: str | None = Field(
        None, description="folder or hub id of the text encoder, for kind frozen")
    feature_cache: str | None = Field(
        None, description="folder where its features are kept and found again; none = encode each "
                          "caption whenever it comes")
    padding: Literal["right", "left"] = Field(
        "right", description="of short captions, for kind frozen; left: LlamaGen, whose last text "
                             "slot predicts the first token")

    @field_validator("kind")
    @classmethod
    def _check_kind(cls, kind: str) -> str:
        choose(TEXT_SOURCES, kind, "text.kind")
        return kind

    @model_validator(mode="after")
    def _check_read(self) -> TextConfig:
        """Refuse options that this kind of text would not read."""
        frozen = self.kind == "frozen"
        if frozen != (self.encoder is not None):  # needed by this kind, and read by no other
            raise ValueError("text.encoder, the folder or hub id of a text encoder, is for "
                             "text.kind frozen, which needs it")
        if self.feature_cache and not frozen:
            raise ValueError(f"text.feature_cache is for text.kind frozen, not {self.kind}; "
                             "leave it out")
        if self.padding == "left" and not frozen:
            raise ValueError(f"text.padding left is for text.kind frozen, not {self.kind}; "
                             "leave it out")
        if frozen and (self.tokenizer or self.vocab_size):
            raise ValueError("text.kind frozen has a tokenizer of its own; leave text.tokenizer "
                             "and text.vocab_size out")

        sizes_given = self.vocab_size or self.text_length
        if self.kind == "classes" and sizes_given:
            raise ValueError("text.kind classes reads one id per caption; leave text.vocab_size "
                             "and text.text_length out")
        if self.tokenizer and sizes_given:
            raise ValueError("text.tokenizer names a trained one, which has its own vocab_size and "
                             "text_length; leave them out")
        return self

    def check_workers(self, workers: int) -> None:
        """ValueError if data workers would each need the frozen text encoder."""
        # with a cache the features are encoded before training, and workers only read them
        if self.kind == "frozen" and workers and not self.feature_cache:
            raise ValueError("data.workers cannot share a text encoder; name a folder for "
                             "text.feature_cache, or set data.workers to 0")
