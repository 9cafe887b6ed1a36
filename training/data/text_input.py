"""Choose the text input that a run trains with."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from seq2seq import ClassLabels, FrozenTextEncoder, TextSource, TextTokenizer
from seq2seq.text_sources import load_text_source
from tokenloom_common.errors import UserError
from training.config.text import TextConfig

# where the config has none
DEFAULT_VOCAB_SIZE = 2048
DEFAULT_TEXT_LENGTH = 32


class CaptionRows(Protocol):
    """Data with captions: token shards, or captioned images."""

    def __len__(self) -> int: ...
    def captions(self, row: int, /) -> list[str]: ...
    def all_captions(self) -> list[str]: ...


def choose_text_source(text: TextConfig, data: CaptionRows, kept: Path | None) -> TextSource:
    """Load the text source that the config names, or else the one of the resumed run, or make one.

    kept: folder of the text source of the run that is resumed. A new one is made of the captions.
    """
    text_length = text.text_length or DEFAULT_TEXT_LENGTH
    if text.kind == FrozenTextEncoder.kind:
        return FrozenTextEncoder.load(text.encoder or "", text_length, padding=text.padding)
    if text.tokenizer:
        return load_text_source(text.tokenizer)

    # the ids of a new text tokenizer would mean other words than the trained ones
    if kept is not None and kept.is_dir():
        found = load_text_source(kept)
        has_length = text.kind == ClassLabels.kind or found.config.text_length == text_length
        # otherwise the model's config differs too, and resuming is refused for that
        if found.kind == text.kind and has_length:
            return found

    if text.kind == ClassLabels.kind:
        # a row's first caption names its class, as for TokenVisits
        rows = (data.captions(row) for row in range(len(data)))
        return ClassLabels.collect(captions[0] for captions in rows if captions)
    if text.kind != TextTokenizer.kind:
        raise UserError(f"text.kind {text.kind} is not made of captions here; name the folder of "
                        "one with text.tokenizer")
    vocab_size = text.vocab_size or DEFAULT_VOCAB_SIZE
    return TextTokenizer.train(data.all_captions(), vocab_size, text_length)
