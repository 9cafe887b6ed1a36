"""Captions -> text ids by GPT-2's and BART's byte-pair encoding: vocab.json and merges.txt."""

# Axes: B captions, T text ids

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from seq2seq.bpe_splitting import ByteLevelSplitter, Merges, SpaceSplitter
from seq2seq.text_tokenizer import TextBatch
from tokenloom_common.config import StrictConfig
from tokenloom_common.errors import MissingFileError, UserError, one_line
from tokenloom_common.files import atomic_folder
from tokenloom_common.pretrained import read_config, write_config

log = logging.getLogger(__name__)

VOCAB_NAME, MERGES_NAME = "vocab.json", "merges.txt"
KIND = "bpe"
MAX_FILE_BYTES = 64 << 20  # BART's are below 1 MB
MAX_ID = 1 << 24
BEGIN, PAD, END, UNKNOWN = "<s>", "<pad>", "</s>", "<unk>"
HEADER = "#version"
"""First word of merges.txt."""


class BPETokenizerConfig(StrictConfig):
    """config.json of a byte-pair tokenizer, beside its vocabulary and merges."""

    vocab_size: int = Field(
        ge=4, le=1 << 20, description="rows of the model's table of text ids, which may be more or "
        "fewer than vocab.json has entries")
    text_length: int = Field(
        ge=2, le=4096, description="T: ids per caption, the two around it included")
    splitting: Literal["spaces", "bytes"] = Field(
        "bytes", description="spaces: min-dalle's; bytes: GPT-2's and BART's")
    lowercase: bool = Field(True, description="captions in lower case")
    prefix_space: bool = Field(
        False, description="a space before the caption, so that its first word is as any other "
        "(DALL-E mega's text normalisation)")

    @model_validator(mode="after")
    def _check_spaces(self) -> Self:
        if self.splitting == "spaces" and (not self.lowercase or self.prefix_space):
            raise ValueError("splitting: spaces is always in lower case and marks every word; "
                             "lowercase and prefix_space are for splitting: bytes")
        return self


class BPETokenizer:
    """<s>, the caption's pieces, </s>, padding up to T. The null caption is <s></s>.

    Cut captions: `bytes` keeps </s>; `spaces` loses it, as min-dalle does.
    """

    kind: ClassVar[str] = KIND
    feature_width: ClassVar[None] = None

    def __init__(self, vocab_text: str, merges_text: str, config: BPETokenizerConfig) -> None:
        """vocab_text, merges_text: the contents of the two files. UserError for any damage."""
        self.config = config
        self.vocab_text, self.merges_text = vocab_text, merges_text  # saved as they were read
        vocab, merges = read_vocab(vocab_text), read_merges(merges_text)
        _check_ids(vocab, merges, config.vocab_size)
        self._begin, self._pad, self._end = vocab[BEGIN], vocab[PAD], vocab[END]
        self._pieces = {number: piece for piece, number in vocab.items()}

        self._splitter: ByteLevelSplitter | SpaceSplitter
        if config.splitting == "bytes":
            self._splitter = ByteLevelSplitter(vocab, merges, config.lowercase, config.prefix_space)
        else:
            self._splitter = SpaceSplitter(vocab, merges, unknown=vocab[UNKNOWN])
        self._warned = False

    @property
    def vocab_size(self) -> int:
        """Number of text ids that a model has rows for."""
        return self.config.vocab_size

    @property
    def pad_id(self) -> int:
        """Id of the padding after a caption."""
        return self._pad

    def encode(self, captions: Sequence[str]) -> TextBatch:
        """Encode captions. Too long ones are cut, with one warning; "" is the null caption."""
        length = self.config.text_length
        text_ids = torch.full((len(captions), length), self._pad, dtype=torch.int64)
        for row, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise UserError(f"caption {row} is {type(caption).__name__}, expected text")
            ids = [self._begin, *self._splitter.ids(caption, length), self._end]
            if len(ids) > length:  # a splitter may stop early, but never below `length` ids
                self._warn_once(caption)
                ids = ids[:length]
                if self.config.splitting == "bytes":
                    ids[-1] = self._end
            text_ids[row, : len(ids)] = torch.tensor(ids)
        return TextBatch(text_ids, text_ids != self._pad)

    def null_caption(self, count: int = 1) -> TextBatch:
        """Encode <s></s> `count` times, for caption dropout and guidance."""
        return self.encode([""] * count)

    @property
    def null_each(self) -> bool:
        """Whether `null_for` gives each caption a null caption of its own."""
        return self.config.splitting == "spaces"

    def null_for(self, captions: TextBatch) -> TextBatch:
        """Unconditional text for classifier-free guidance.

        One null caption for all `captions`; with min-dalle's splitting one for each, of its first
        and last id: the last id of a cut caption is no </s>.
        """
        if not self.null_each:
            return self.null_caption()
        text_ids, mask = captions
        last = mask.sum(dim=1, keepdim=True) - 1  # [B, 1]: padding is on the right
        null_ids = torch.full_like(text_ids, self._pad)
        null_ids[:, 0] = text_ids[:, 0]
        null_ids[:, 1] = text_ids.gather(1, last)[:, 0]
        return TextBatch(null_ids, null_ids != self._pad)

    def words(self, caption: str) -> list[str]:
        """Return the piece at each position that is not padding."""
        batch = self.encode([caption])
        return [self._pieces[number] for number in batch.text_input[batch.text_mask].tolist()]

    def _warn_once(self, caption: str) -> None:
        if not self._warned:
            log.warning("a caption is cut to text_length %d (%.40r...); further cuts are not "
                        "reported", self.config.text_length, caption)
            self._warned = True

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write vocab.json, merges.txt and config.json; the folder appears whole."""
        with atomic_folder(Path(folder), (VOCAB_NAME, MERGES_NAME, "config.json")) as aside:
            self.write_files(aside)
        return Path(folder)

    def write_files(self, folder: Path) -> None:
        """Write the three files into an existing folder."""
        # newline="": line ends stay as they were read, on every system
        (folder / VOCAB_NAME).write_text(self.vocab_text, encoding="utf-8", newline="")
        (folder / MERGES_NAME).write_text(self.merges_text, encoding="utf-8", newline="")
        write_config(KIND, self.config, folder)

    @classmethod
    def from_files(cls, vocab: Path, merges: Path, config: BPETokenizerConfig) -> BPETokenizer:
        """Make a tokenizer of two files. UserError naming the file on any damage."""
        texts = read_text(vocab), read_text(merges)
        try:
            return cls(*texts, config)
        except UserError as error:
            raise UserError(f"{vocab.parent}: {error}") from None

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> BPETokenizer:
        """Load a folder that save_pretrained wrote. UserError naming the file on any damage."""
        path = Path(folder)
        config = read_config(path, KIND, BPETokenizerConfig)
        return cls.from_files(path / VOCAB_NAME, path / MERGES_NAME, config)


def read_text(path: Path) -> str:
    """Read a text file of bounded size as it is, line ends included."""
    if not path.is_file():
        raise MissingFileError(f"{path}: missing; copy the text tokenizer's files again")
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise UserError(f"{path}: {size:,} bytes is too large for a vocabulary "
                        f"(limit {MAX_FILE_BYTES:,})")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None


def read_vocab(text: str) -> dict[str, int]:
    """Parse vocab.json: piece -> id, every id once, with <s>, <pad>, </s> and <unk>."""
    try:
        vocab = json.loads(text)
        "".join(vocab).encode()  # refuses lone surrogates, which could not be saved
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{VOCAB_NAME} cannot be read: {one_line(error)[:200]}") from None
    if not isinstance(vocab, dict) or not all(map(_is_id, vocab.values())):
        raise UserError(f"{VOCAB_NAME} is not a mapping of pieces to ids")
    if len(set(vocab.values())) != len(vocab):
        raise UserError(f"{VOCAB_NAME} gives two pieces the same id")
    missing = [name for name in (BEGIN, PAD, END, UNKNOWN) if name not in vocab]
    if missing:
        raise UserError(f"{VOCAB_NAME} lacks {', '.join(missing)}, so it is not BART's kind of "
                        "vocabulary")
    return vocab


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < MAX_ID  # true and false are no ids


def read_merges(text: str) -> Merges:
    """Parse merges.txt: a line with its version, then a pair per line, in order of merging."""
    first, *lines = text.split("\n")
    if not first.startswith(HEADER):
        raise UserError(f"{MERGES_NAME} does not begin with a line '{HEADER}: ...', so it is not a "
                        "list of merges")
    while lines and not lines[-1].strip():  # empty lines at the end are no damage
        lines.pop()

    merges = []
    for number, line in enumerate(lines, start=2):  # line 1 is the header
        pair = line.split()
        if len(pair) != 2:
            raise UserError(f"{MERGES_NAME}, line {number}: expected two pieces, found "
                            f"{line[:40]!r}")
        merges.append((pair[0], pair[1]))
    return merges


def _check_ids(vocab: dict[str, int], merges: Merges, vocab_size: int) -> None:
    """UserError if a caption can have an id that the model has no row for.

    Ids that no caption can have, such as <mask>'s, may be beyond.
    """
    # an unmerged piece is one character; merging makes all others
    special = {BEGIN, PAD, END, UNKNOWN}
    single = {piece for piece in vocab if len(piece) == 1}
    merged = {left + right for left, right in merges}
    # a merge that the vocabulary lacks has no id: `spaces` gives UNKNOWN, `bytes` refuses the files
    highest = max(vocab.get(piece, 0) for piece in special | single | merged)
    if highest >= vocab_size:
        raise UserError(f"{VOCAB_NAME} has ids up to {highest}, the model reads {vocab_size} of "
                        "them; use the vocabulary that it was trained with")
