"""Text sources by kind: they turn captions into a model's text input.

Ids of SentencePiece or of a published model's byte-pair encoding, class numbers, or a frozen
encoder's features.
"""

from __future__ import annotations

from pathlib import Path

from seq2seq.bpe_tokenizer import BPETokenizer
from seq2seq.class_labels import ClassLabels
from seq2seq.frozen_text import FrozenTextEncoder
from seq2seq.text_tokenizer import TextTokenizer
from tokenloom_common.config import read_mapping
from tokenloom_common.errors import UserError, choose

TextSource = TextTokenizer | BPETokenizer | ClassLabels | FrozenTextEncoder
"""Each has `encode(captions)` and `null_caption(count)` -> TextBatch; `null_for(encoded captions)`
-> TextBatch of one row, or with `null_each` of as many rows as captions; `config.text_length`; and
one of `vocab_size` and `feature_width`, the other being None."""

TEXT_SOURCES: dict[str, type[TextSource]] = {
    source.kind: source for source in (TextTokenizer, BPETokenizer, ClassLabels, FrozenTextEncoder)}


def load_text_source(folder: str | Path, text_encoder: str | None = None) -> TextSource:
    """Load a folder that a text source wrote.

    text_encoder: where a frozen encoder is, if not where the folder says.
    """
    path = Path(folder) / "config.json"
    kind = TextTokenizer.kind  # its loader says what a folder without config.json lacks
    if path.is_file():
        kind = str(read_mapping(path).get("kind"))

    source = choose(TEXT_SOURCES, kind, f"{path}: kind of text tokenizer")
    if source is FrozenTextEncoder:
        return FrozenTextEncoder.from_pretrained(folder, text_encoder)
    # an option that nothing reads would be a silent mistake
    if text_encoder is not None:
        raise UserError(f"{folder}: this model has a text tokenizer of its own; leave the text "
                        "encoder out")
    return source.from_pretrained(folder)
