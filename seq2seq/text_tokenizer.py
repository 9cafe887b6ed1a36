"""Captions -> text ids, with SentencePiece (Kudo & Richardson 2018): byte-pair encoding, byte fallback, case folded."""

# Axes: B captions, T text ids

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

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
PAD, UNKNOWN, END, NULL = 0, 1, 2, 3  # ids of the control symbols; NULL stands for "no caption"
MAX_TRAINING_SENTENCES = 2_000_000
MAX_MODEL_BYTES = 64 << 20
BYTE_PIECES = 256


class TextTokenizerConfig(StrictConfig):
    """What config.json of a text tokenizer holds beside its SentencePiece model."""

    vocab_size: int = Field(ge=BYTE_PIECES + 8, le=1 << 20, description="entries, the 256 byte pieces included")
    text_length: int = Field(ge=2, le=4096, description="T: ids per caption, the end symbol included")


class TextBatch(NamedTuple):
    """text_input: ids [B, T] int64 or a frozen encoder's features [B, T, F] float32; text_mask [B, T] bool, True = real."""

    text_input: Tensor
    text_mask: Tensor


class TextTokenizer:
    """SentencePiece with a fixed length. Each caption ends in END; the null caption is the one learned id NULL."""

    kind: ClassVar[str] = KIND
    feature_width: ClassVar[None] = None
    null_each: ClassVar[bool] = False

    def __init__(self, model_proto: bytes, config: TextTokenizerConfig) -> None:
        self.config = config
        self.model_proto = model_proto
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
        except (RuntimeError, TypeError) as error:
            raise UserError(f"not a SentencePiece model ({one_line(error)})") from None
        if self._pieces.get_piece_size() != config.vocab_size:
            raise UserError(f"the SentencePiece model has {self._pieces.get_piece_size()} pieces, its config.json says "
                            f"{config.vocab_size}; copy or train the text tokenizer again")
        self._warned = False

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, text_length: int) -> TextTokenizer:
        """Train on captions. The vocabulary may come out smaller than `vocab_size` when the captions hold less."""
        unique = sorted(set(captions))
        unique = unique[:: -(-len(unique) // MAX_TRAINING_SENTENCES) or 1]  # every n-th of a very large set
        if not unique:
            raise UserError("no captions to train a text tokenizer on")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(unique), model_writer=model, model_type="bpe", vocab_size=vocab_size,
                hard_vocab_limit=False, byte_fallback=True, character_coverage=0.9995,
                normalization_rule_name="nmt_nfkc_cf",  # "A Red Heart" and "a red heart" are one caption
                pad_id=PAD, unk_id=UNKNOWN, bos_id=-1, eos_id=END, control_symbols=["<null>"],
                max_sentence_length=1 << 16, num_threads=1, minloglevel=2)
        except RuntimeError as error:
            raise UserError(f"SentencePiece could not be trained with text.vocab_size {vocab_size}: {one_line(error)}") from None
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        return cls(model.getvalue(), TextTokenizerConfig(vocab_size=pieces.get_piece_size(), text_length=text_length))

    @property
    def vocab_size(self) -> int:
        """Number of text ids."""
        return self.config.vocab_size

    def encode(self, captions: Sequence[str]) -> TextBatch:
        """Captions -> TextBatch. Too long ones are cut, END kept, with one warning; an empty caption is the null caption."""
        length = self.config.text_length
        text_ids = torch.full((len(captions), length), PAD, dtype=torch.int64)
        for row, caption in enumerate(captions):
            if isinstance(caption, bytes) or not isinstance(caption, str):
                raise UserError(f"caption {row} is {type(caption).__name__}, expected text")
            ids = self._pieces.encode(caption.encode("utf-8", "replace").decode()) or [NULL]
            if len(ids) > length - 1:
                self._warn_once(caption, len(ids))
                ids = ids[: length - 1]
            text_ids[row, : len(ids) + 1] = torch.tensor([*ids, END])
        return TextBatch(text_ids, text_ids != PAD)

    def null_caption(self, count: int = 1) -> TextBatch:
        """The caption that says nothing, `count` times: what training drops captions to and guidance starts from."""
        return self.encode([""] * count)

    def null_for(self, captions: TextBatch) -> TextBatch:
        """What guidance leads away from for encoded captions: one null caption for all of them."""
        return self.null_caption()

    def count(self, caption: str) -> int:
        """Ids that a caption needs without truncation, the end symbol included."""
        return len(self._pieces.encode(caption)) + 1

    def pieces(self, text_ids: Sequence[int]) -> list[str]:
        """The piece of each id, for people to read."""
        return [self._pieces.id_to_piece(int(i)) for i in text_ids]

    def words(self, caption: str) -> list[str]:
        """The piece at each position that is not padding."""
        batch = self.encode([caption])
        return self.pieces(batch.text_input[batch.text_mask].tolist())

    def _warn_once(self, caption: str, needed: int) -> None:
        if not self._warned:
            log.warning("a caption needs %d text ids and is cut to text_length %d (%.40r...); further cuts are not reported",
                        needed + 1, self.config.text_length, caption)
            self._warned = True

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write spiece.model and config.json; the folder appears whole."""
        with atomic_folder(Path(folder), (MODEL_NAME, "config.json")) as aside:
            self.write_files(aside)
        return Path(folder)

    def write_files(self, folder: Path) -> None:
        """The two files into an existing folder."""
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
        if model.stat().st_size > MAX_MODEL_BYTES:
            raise UserError(f"{model}: {model.stat().st_size:,} bytes is too large for a SentencePiece model")
        try:
            return cls(model.read_bytes(), config)
        except UserError as error:
            raise UserError(f"{model}: {error}") from None
