"""Captions -> text ids by SentencePiece (Kudo & Richardson 2018, https://arxiv.org/abs/1808.06226).

Byte-pair encoding with byte fallback, case folded.
"""

# Axes: B captions, T text ids

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import sentencepiece
import torch
from pydantic import Field
from torch import Tensor

from tokenloom_common.config import StrictConfig
from tokenloom_common.errors import MissingFileError, UserError, one_line
from tokenloom_common.files import atomic_folder
from tokenloom_common.pretrained import read_config, write_config

log = logging.getLogger(__name__)

MODEL_NAME = "spiece.model"
KIND = "sentencepiece"
PAD, UNKNOWN, END, NULL = 0, 1, 2, 3
"""Ids of the control symbols; NULL stands for "no caption"."""
MAX_TRAINING_SENTENCES = 2_000_000
MAX_MODEL_BYTES = 64 << 20
MAX_SENTENCE_BYTES = 1 << 16
"""Longer captions are cut for training; SentencePiece would leave them out silently."""
MAX_NORMALIZED_BYTES = 32 * MAX_SENTENCE_BYTES  # NFKC makes up to 18 characters of one
CHARACTER_COVERAGE = 0.9995
"""Share of the text that has pieces of its own; rarer characters are spelled in bytes."""
NORMALIZATION = "nmt_nfkc_cf"  # case folded: "Heart" and "heart" are one word
GAP = "\ue000"
"""Stands for left-out characters while training; of Unicode's area for private use."""
BYTE_PIECES = 256
FIXED_PIECES = BYTE_PIECES + 4  # and the control symbols
LEAST_VOCAB_SIZE = BYTE_PIECES + 8
"""Smallest vocabulary to ask for: captions of fewer different characters may give a smaller one."""


class TextTokenizerConfig(StrictConfig):
    """config.json of a text tokenizer, beside its SentencePiece model."""

    vocab_size: int = Field(
        ge=FIXED_PIECES + 1, le=1 << 20, description="entries, the 256 byte pieces included")
    text_length: int = Field(
        ge=2, le=4096, description="T: ids per caption, the end symbol included")


class TextBatch(NamedTuple):
    """Encoded captions.

    text_input: ids [B, T] int64 or a frozen encoder's features [B, T, F] float32;
    text_mask: [B, T] bool, True = real.
    """

    text_input: Tensor
    text_mask: Tensor


class TextTokenizer:
    """SentencePiece of a fixed length. Captions end in END; the null caption is the id NULL."""

    kind: ClassVar[str] = KIND
    feature_width: ClassVar[None] = None
    null_each: ClassVar[bool] = False

    def __init__(self, model_proto: bytes, config: TextTokenizerConfig) -> None:
        """model_proto: contents of spiece.model. UserError if damaged or of another size."""
        self.config = config
        self.model_proto = model_proto
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
        except (RuntimeError, TypeError) as error:
            raise UserError(f"not a SentencePiece model ({one_line(error)})") from None

        pieces = self._pieces.get_piece_size()
        if pieces != config.vocab_size:
            raise UserError(f"the SentencePiece model has {pieces} pieces, its config.json says "
                            f"{config.vocab_size}; copy or train the text tokenizer again")
        self._warned = False

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, text_length: int) -> TextTokenizer:
        """Train on captions. A small set may give fewer than `vocab_size` entries."""
        if vocab_size < LEAST_VOCAB_SIZE:
            raise UserError(f"text.vocab_size {vocab_size} is too small; give at least "
                            f"{LEAST_VOCAB_SIZE} (bytes and control symbols take {FIXED_PIECES})")
        # the model depends on neither the order of the captions nor on repeats
        unique = sorted(set(captions))
        if not unique:
            raise UserError("no captions to train a text tokenizer on")
        # every n-th of a very large set, which SentencePiece would hold in memory whole
        stride = -(-len(unique) // MAX_TRAINING_SENTENCES)
        model_proto = _train_pieces(unique[::stride], vocab_size)

        pieces = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
        config = TextTokenizerConfig(vocab_size=pieces.get_piece_size(), text_length=text_length)
        return cls(model_proto, config)

    @property
    def vocab_size(self) -> int:
        """Number of text ids."""
        return self.config.vocab_size

    def encode(self, captions: Sequence[str]) -> TextBatch:
        """Encode captions. An empty one is the null caption.

        Too long ones are cut, END kept, with one warning per tokenizer.
        """
        length = self.config.text_length
        text_ids = torch.full((len(captions), length), PAD, dtype=torch.int64)
        for row, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise UserError(f"caption {row} is {type(caption).__name__}, expected text")

            # lone surrogates, which JSON may hold, have no UTF-8
            clean = caption.encode("utf-8", "replace").decode()
            ids = self._pieces.encode(clean) or [NULL]
            if len(ids) > length - 1:
                self._warn_once(caption, len(ids))
                ids = ids[: length - 1]
            text_ids[row, : len(ids) + 1] = torch.tensor([*ids, END])
        return TextBatch(text_ids, text_ids != PAD)  # no caption can spell PAD

    def null_caption(self, count: int = 1) -> TextBatch:
        """Encode the empty caption `count` times, for caption dropout and guidance."""
        return self.encode([""] * count)

    def null_for(self, captions: TextBatch) -> TextBatch:
        """Unconditional text for classifier-free guidance: one null caption for all `captions`."""
        return self.null_caption()

    def count(self, caption: str) -> int:
        """Count the ids of a caption without truncation, the end symbol included."""
        return len(self._pieces.encode(caption)) + 1

    def pieces(self, text_ids: Sequence[int]) -> list[str]:
        """Return the readable piece of each id."""
        return [self._pieces.id_to_piece(int(number)) for number in text_ids]

    def words(self, caption: str) -> list[str]:
        """Return the piece at each position that is not padding."""
        batch = self.encode([caption])
        return self.pieces(batch.text_input[batch.text_mask].tolist())

    def _warn_once(self, caption: str, needed: int) -> None:
        if not self._warned:
            log.warning("a caption needs %d text ids and is cut to text_length %d (%.40r...); "
                        "further cuts are not reported",
                        needed + 1, self.config.text_length, caption)
            self._warned = True

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write spiece.model and config.json; the folder appears whole."""
        with atomic_folder(Path(folder), (MODEL_NAME, "config.json")) as aside:
            self.write_files(aside)
        return Path(folder)

    def write_files(self, folder: Path) -> None:
        """Write the two files into an existing folder."""
        (folder / MODEL_NAME).write_bytes(self.model_proto)
        write_config(KIND, self.config, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TextTokenizer:
        """Load a folder that save_pretrained wrote. UserError naming the file on any damage."""
        path = Path(folder)
        config = read_config(path, KIND, TextTokenizerConfig)
        model = path / MODEL_NAME
        if not model.is_file():
            raise MissingFileError(f"{model}: missing; copy or train the text tokenizer again")

        # the file may be anybody's: look at its size before it is read
        size = model.stat().st_size
        if size > MAX_MODEL_BYTES:
            raise UserError(f"{model}: {size:,} bytes is too large for a SentencePiece model")
        try:
            return cls(model.read_bytes(), config)
        except UserError as error:
            raise UserError(f"{model}: {error}") from None


# ---- training


def _train_pieces(captions: Sequence[str], vocab_size: int) -> bytes:
    """Train SentencePiece; contents of spiece.model.

    Characters that `vocab_size` has no room for are spelled in bytes, the rarest first, with one
    warning. UserError if it cannot be trained.
    """
    try:
        return _sentencepiece(map(_sentence, captions), vocab_size, CHARACTER_COVERAGE)
    except RuntimeError as error:
        counts = _character_counts(captions)
        room = vocab_size - FIXED_PIECES
        if len(counts) == 1:  # the space
            raise UserError("no captions to train a text tokenizer on: all of them are empty or "
                            "white space") from None
        if len(counts) <= room:  # failed for another reason
            raise _not_trained(captions, vocab_size, error) from None

    # by falling count, and by character among equals, so that every run keeps the same ones
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    kept = set(ranked[:room])
    try:
        # coverage 1: what is left out is chosen here, since SentencePiece takes no share below 0.98
        model_proto = _sentencepiece(
            _with_gaps(captions, kept), vocab_size, 1.0, pretokenization_delimiter=GAP,
            max_sentence_length=MAX_NORMALIZED_BYTES)
    except RuntimeError as error:
        raise _not_trained(captions, vocab_size, error) from None

    kept.discard(" ")
    del counts[" "]
    share = sum(counts[character] for character in kept) / counts.total()
    log.warning("text.vocab_size %s has room for %s of the captions' %s different characters "
                "(%.2f %% of the text); the others are spelled in bytes, up to 4 ids each",
                f"{vocab_size:,}", f"{len(kept):,}", f"{len(counts):,}", 100 * share)
    return model_proto


def _not_trained(captions: Sequence[str], vocab_size: int, error: Exception) -> UserError:
    reason = one_line(error).partition("] ")[0][:120]  # what follows names options of its own
    return UserError(f"no text tokenizer could be trained with text.vocab_size {vocab_size:,} on "
                     f"{len(captions):,} different captions ({reason}); check that they are text")


def _sentencepiece(sentences: Iterator[str], vocab_size: int, coverage: float,
                   **options: Any) -> bytes:
    """Run SentencePiece's trainer. RuntimeError with its own text if it fails."""
    model = io.BytesIO()
    limits: dict[str, Any] = {"max_sentence_length": MAX_SENTENCE_BYTES, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=model,
        model_type="bpe",  # unigram has no piece for a word that no other contains
        vocab_size=vocab_size, hard_vocab_limit=False,  # fewer captions give fewer pieces
        byte_fallback=True, character_coverage=coverage,  # rare characters are bytes
        normalization_rule_name=NORMALIZATION,
        pad_id=PAD, unk_id=UNKNOWN, bos_id=-1, eos_id=END,  # -1: models have begin slots
        control_symbols=["<null>"],  # gets the next id, NULL; no caption can spell it
        num_threads=1, minloglevel=2, **limits)
    return model.getvalue()


def _sentence(caption: str) -> str:
    """Return the part of a caption to train on, which has UTF-8: lone surrogates have none."""
    return caption.encode("utf-8", "replace")[:MAX_SENTENCE_BYTES].decode("utf-8", "ignore")


def _character_counts(captions: Sequence[str]) -> Counter[str]:
    """Count each character of the captions, normalized as for training."""
    counts: Counter[str] = Counter()
    for text in _normalized(captions):
        counts.update(text)
    # each caption begins with one, and no caption could be trained on without
    counts[" "] = counts.total() + len(captions)
    return counts


def _with_gaps(captions: Sequence[str], kept: set[str]) -> Iterator[str]:
    """Yield the captions with GAP, which no piece holds, for each character that is not kept."""
    for text in _normalized(captions):
        yield "".join(character if character in kept else GAP for character in text)


def _normalized(captions: Sequence[str]) -> Iterator[str]:
    normalizer = sentencepiece.SentencePieceNormalizer(
        rule_name=NORMALIZATION, escape_whitespaces=False, add_dummy_prefix=False)
    for caption in captions:
        yield normalizer.normalize(_sentence(caption))
