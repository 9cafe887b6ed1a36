"""Class names instead of captions: one learned vector per class, as ImageNet's (LlamaGen c2i)."""

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

MAX_CLASSES = 1 << 16  # more different names are captions, not classes


class ClassLabelsConfig(StrictConfig):
    """Class names, in the order of their ids."""

    classes: tuple[str, ...] = Field(min_length=1, max_length=MAX_CLASSES)

    @field_validator("classes")
    @classmethod
    def _different(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        keys = {_key(name) for name in classes}
        if len(keys) != len(classes) or "" in keys:
            raise ValueError("class names must differ (also in lower case) and not be empty")
        return classes

    @property
    def text_length(self) -> int:
        """One id per caption."""
        return 1


def _key(name: str) -> str:
    """The spelling by which names are compared."""
    return name.strip().casefold()


class ClassLabels(SavedAsConfig):
    """Class name (or its number as text) -> id; the null caption "" is the id after the last."""

    kind: ClassVar[str] = "classes"
    feature_width: ClassVar[None] = None
    null_each: ClassVar[bool] = False

    def __init__(self, config: ClassLabelsConfig) -> None:
        self.config = config
        self._ids = {_key(name): number for number, name in enumerate(config.classes)}

    @classmethod
    def collect(cls, names: Iterable[str]) -> ClassLabels:
        """Collect the classes that occur, sorted. UserError for none or too many."""
        by_key: dict[str, str] = {}
        for name in names:
            # "Cat" and "cat" are one class, named as it was spelt first
            by_key.setdefault(_key(name), name.strip())
        by_key.pop("", None)  # the null caption, which has an id anyway

        if not 1 <= len(by_key) <= MAX_CLASSES:
            raise UserError(f"{len(by_key):,} different class names; text.kind classes takes 1 to "
                            f"{MAX_CLASSES:,}. For free captions use text.kind sentencepiece")
        classes = tuple(by_key[key] for key in sorted(by_key))
        return cls(ClassLabelsConfig(classes=classes))

    @property
    def vocab_size(self) -> int:
        """Number of ids: the classes and the null caption."""
        return len(self.config.classes) + 1

    def encode(self, captions: Sequence[str]) -> TextBatch:
        """Class names -> ids [B, 1] and a mask that is all True. UserError for an unknown class."""
        numbers = [self._id(caption) for caption in captions]
        ids = torch.tensor(numbers, dtype=torch.int64).reshape(-1, 1)  # [0, 1] for no captions
        return TextBatch(ids, torch.ones_like(ids, dtype=torch.bool))

    def _id(self, caption: str) -> int:
        if not isinstance(caption, str):
            raise UserError(f"a class name must be text, got {type(caption).__name__}")
        classes = len(self.config.classes)
        key = _key(caption)
        if not key:
            return classes

        # a class may be named by a number: its name goes before the number of another
        if key in self._ids:
            return self._ids[key]
        if key.isdecimal() and int(key) < classes:
            return int(key)
        raise UserError(f"unknown class '{caption}'{nearest_name(key, self._ids)} "
                        f"(this model knows {classes:,} classes)")

    def null_caption(self, count: int = 1) -> TextBatch:
        """Encode "no class" `count` times, for caption dropout and guidance."""
        return self.encode([""] * count)

    def null_for(self, captions: TextBatch) -> TextBatch:
        """Unconditional text for classifier-free guidance: one null caption for all `captions`."""
        return self.null_caption()

    def words(self, caption: str) -> list[str]:
        """Return the name of each id: the caption itself."""
        return [caption.strip()]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ClassLabels:
        """Load a folder that save_pretrained wrote. UserError naming the file on any damage."""
        return cls(read_config(Path(folder), cls.kind, ClassLabelsConfig))
