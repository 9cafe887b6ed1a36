"""Config of the text source."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from seq2seq import TEXT_SOURCES
from tokenloom_common.config import StrictConfig
from tokenloom_common.errors import choose


class TextConfig(StrictConfig):
    """What the model reads: ids of a text tokenizer, a class, or the features of a frozen text encoder."""

    kind: str = Field(
        "sentencepiece", description="sentencepiece: captions as ids; classes: a row's first caption is its class, one learned "
        "vector each; frozen: features of a pretrained text encoder")
    tokenizer: str | None = Field(None, description="folder of a trained text tokenizer (for sentencepiece also of a published "
                                  "model's byte-pair encoding); none = train one on the captions")
    vocab_size: int | None = Field(None, ge=264, le=1 << 20, description="of the one that is trained; none = 2048")
    text_length: int | None = Field(None, ge=2, le=4096, description="ids per caption, the end included; none = 32")
    encoder: str | None = Field(None, description="folder or hub id of the text encoder, for kind frozen")
    feature_cache: str | None = Field(None, description="folder where its features are kept and found again; none = encode "
                                      "each caption whenever it comes")
    padding: Literal["right", "left"] = Field("right", description="of short captions, for kind frozen; left: LlamaGen, whose "
                                              "last text slot predicts the first token")

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        choose(TEXT_SOURCES, kind, "text.kind")
        return kind

    @model_validator(mode="after")
    def _only_what_is_read(self) -> TextConfig:
        frozen = self.kind == "frozen"
        if frozen != (self.encoder is not None):
            raise ValueError("text.encoder, the folder or hub id of a text encoder, is for text.kind frozen, which needs it")
        if self.feature_cache and not frozen:
            raise ValueError(f"text.feature_cache is for text.kind frozen, not {self.kind}; leave it out")
        if self.padding == "left" and not frozen:
            raise ValueError(f"text.padding left is for text.kind frozen, not {self.kind}; leave it out")
        if frozen and (self.tokenizer or self.vocab_size):
            raise ValueError("text.kind frozen has a tokenizer of its own; leave text.tokenizer and text.vocab_size out")
        if self.kind == "classes" and (self.vocab_size or self.text_length):
            raise ValueError("text.kind classes reads one id a class; leave text.vocab_size and text.text_length out")
        if self.tokenizer and (self.vocab_size or self.text_length):
            raise ValueError("text.tokenizer names a trained one, which has its own vocab_size and text_length; leave them out")
        return self
