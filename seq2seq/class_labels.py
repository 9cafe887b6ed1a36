"""Class names instead of captions: one learned vector a class, as ImageNet models have (LlamaGen c2i)."""

# Axes: B captions

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field, field_validator

from seq2seq.text_tokenizer import TextBatch
from tokenloom_common.config import StrictConfig
from tokenloom_common.errors import UserError, nearest_name
from tokenloom_common.pretrained import SavedAsConfig, read_config

MAX_CLASSES = 1 << 16


class ClassLabelsConfig(StrictConfig):
    """The classes, in the order of their ids."""

    classes: tuple[str, ...] = Field(min_length=1, max_length=MAX_CLASSES)

    @field_validator("classes")
    @classmethod
    def _different(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        if len({name.strip().casefold() for name in classes}) != len(classes) or not all(name.strip() for name in classes):
            raise ValueError("class names must differ (also in lower case) and not be empty")
        return classes

    @property
    def text_length(self) -> int:
        """One id a caption."""
        return 1


class ClassLabels(SavedAsConfig):
    """A class name (or its number as text) -> one id; the null caption, an empty text, is the id after the last class."""

    kind: ClassVar[str] = "classes"
    feature_width: ClassVar[None] = None
    null_each: ClassVar[bool] = False

    def __init__(self, config: ClassLabelsConfig) -> None:
        self.config = config
        self._ids = {name.strip().casefold(): number for number, name in enumerate(config.classes)}

    @classmethod
    def collect(cls, names: Iterable[str]) -> ClassLabels:
        """The classes that occur, sorted. UserError for none or too many."""
        by_key: dict[str, str] = {}
        for name in names:
            by_key.setdefault(name.strip().casefold(), name.strip())
        by_key.pop("", None)
        if not 1 <= len(by_key) <= MAX_CLASSES:
            raise UserError(f"{len(by_key):,} different class names; text.kind classes takes 1 to {MAX_CLASSES:,}. "
                            "For free captions use text.kind sentencepiece")
        return cls(ClassLabelsConfig(classes=tuple(by_key[key] for key in sorted(by_key))))

    @property
    def vocab_size(self) -> int:
        """Ids: the classes and the null caption."""
        return len(self.config.classes) + 1

    def encode(self, captions: Sequence[str]) -> TextBatch:
        """Class names -> ids [B, 1] and a mask that is all True. UserError for an unknown class, with the nearest one."""
        ids = torch.tensor([[self._id(caption)] for caption in captions], dtype=torch.int64).reshape(-1, 1)
        return TextBatch(ids, torch.ones_like(ids, dtype=torch.bool))

    def _id(self, caption: str) -> int:
        if not isinstance(caption, str):
            raise UserError(f"a class name must be text, got {type(caption).__name__}")
        key = caption.strip().casefold()
        if not key:
            return len(self.config.classes)
        if key in self._ids:
            return self._ids[key]
        if key.isdecimal() and int(key) < len(self.config.classes):
            return int(key)
        raise UserError(f"unknown class '{caption}'{nearest_name(key, self._ids)} "
                        f"(this model knows {len(self._ids):,} classes)")

    def null_caption(self, count: int = 1) -> TextBatch:
        """No class, `count` times: what training drops classes to and guidance starts from."""
        return self.encode([""] * count)

    def null_for(self, captions: TextBatch) -> TextBatch:
        """What guidance leads away from for encoded captions: one null caption for all of them."""
        return self.null_caption()

    def words(self, caption: str) -> list[str]:
        """What each id stands for."""
        return [caption.strip()]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ClassLabels:
        """Load a folder that save_pretrained wrote. UserError naming the file on any damage."""
        return cls(read_config(Path(folder), cls.kind, ClassLabelsConfig))
