"""Captions -> text ids with a published model's byte-pair encoding: vocab.json and merges.txt, as GPT-2 and BART keep them.

Two ways of splitting a caption before its pairs are merged:

- `bytes`: GPT-2's byte level (Radford et al. 2019), as BartTokenizer, which DALL-E mini trains with;
- `spaces`: min-dalle's, which reads ASCII alone: emoji by their names, lower case, words between spaces.
"""

# Axes: B captions, T text ids

from __future__ import annotations

import heapq
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from seq2seq.text_tokenizer import TextBatch
from tokenloom_common.config import StrictConfig
from tokenloom_common.errors import MissingFileError, UserError, one_line
from tokenloom_common.files import atomic_folder
from tokenloom_common.pretrained import read_config, write_config

log = logging.getLogger(__name__)

VOCAB_NAME, MERGES_NAME = "vocab.json", "merges.txt"
KIND = "bpe"
MAX_FILE_BYTES = 64 << 20
MAX_ID = 1 << 24
BEGIN, PAD, END, UNKNOWN = "<s>", "<pad>", "</s>", "<unk>"
SPACE = chr(ord(" ") + 256)  # how the vocabulary writes a space
HEADER = "#version"


class BPETokenizerConfig(StrictConfig):
    """What config.json of such a text tokenizer holds beside its vocabulary and merges."""

    vocab_size: int = Field(ge=4, le=1 << 20, description="rows of the model's table of text ids, which may be more or fewer "
                            "than vocab.json has entries")
    text_length: int = Field(ge=2, le=4096, description="T: ids per caption, the two around it included")
    splitting: Literal["spaces", "bytes"] = Field("bytes", description="spaces: min-dalle's; bytes: GPT-2's and BART's")
    lowercase: bool = Field(True, description="captions in lower case")
    prefix_space: bool = Field(False, description="a space before the caption, so that its first word is as any other "
                               "(DALL-E mega's text normalisation)")

    @model_validator(mode="after")
    def _check_spaces(self) -> Self:
        if self.splitting == "spaces" and (not self.lowercase or self.prefix_space):
            raise ValueError("splitting: spaces is always in lower case and marks every word; lowercase and prefix_space are "
                             "for splitting: bytes")
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
        self.vocab_text, self.merges_text = vocab_text, merges_text
        self._vocab, merges = read_vocab(vocab_text), read_merges(merges_text)
        _check_ids(self._vocab, merges, config.vocab_size)
        self._begin, self._pad, self._end, self._unknown = (self._vocab[name] for name in (BEGIN, PAD, END, UNKNOWN))
        self._pieces = {number: piece for piece, number in self._vocab.items()}
        self._split: Callable[[str, int], list[int]]
        if config.splitting == "bytes":
            self._byte_level = _byte_level(self._vocab, merges, config)
            self._split = self._split_bytes
        else:
            self._ranks = {pair: rank for rank, pair in enumerate(merges)}
            self._split = self._split_spaces
        self._warned = False

    @property
    def vocab_size(self) -> int:
        """Number of text ids that a model has rows for."""
        return self.config.vocab_size

    @property
    def pad_id(self) -> int:
        """The id after a caption's end."""
        return self._pad

    def encode(self, captions: Sequence[str]) -> TextBatch:
        """Captions -> TextBatch. Too long ones are cut, with one warning; an empty caption is the null caption."""
        length = self.config.text_length
        text_ids = torch.full((len(captions), length), self._pad, dtype=torch.int64)
        for row, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise UserError(f"caption {row} is {type(caption).__name__}, expected text")
            ids = [self._begin, *self._split(caption, length), self._end]
            if len(ids) > length:
                self._warn_once(caption)
                ids = ids[:length] if self.config.splitting == "spaces" else [*ids[: length - 1], self._end]
            text_ids[row, : len(ids)] = torch.tensor(ids)
        return TextBatch(text_ids, text_ids != self._pad)

    def _split_bytes(self, caption: str, enough: int) -> list[int]:
        return self._byte_level.encode(caption.encode("utf-8", "replace").decode(), add_special_tokens=False).ids

    def _split_spaces(self, caption: str, enough: int) -> list[int]:
        """What a caption of any length says in its first `enough` ids, or a few more."""
        ids: list[int] = []
        for word in _as_ascii(caption).split(" "):
            if word:
                ids += [self._vocab.get(piece, self._unknown) for piece in merge_pairs([SPACE, *word], self._ranks)]
            if len(ids) >= enough:
                break
        return ids

    def null_caption(self, count: int = 1) -> TextBatch:
        """<s></s>, `count` times: what training drops captions to and guidance starts from."""
        return self.encode([""] * count)

    @property
    def null_each(self) -> bool:
        """Whether each caption has a null caption of its own."""
        return self.config.splitting == "spaces"

    def null_for(self, captions: TextBatch) -> TextBatch:
        """What guidance leads away from: the null caption; min-dalle takes a caption's first and last id, and the last one of a
        cut caption is no </s>."""
        if not self.null_each:
            return self.null_caption()
        text_ids, mask = captions
        last = mask.sum(dim=1, keepdim=True) - 1  # [C, 1]
        null_ids = torch.full_like(text_ids, self._pad)
        null_ids[:, 0], null_ids[:, 1] = text_ids[:, 0], text_ids.gather(1, last)[:, 0]
        return TextBatch(null_ids, null_ids != self._pad)

    def words(self, caption: str) -> list[str]:
        """The piece at each position that is not padding."""
        batch = self.encode([caption])
        return [self._pieces[number] for number in batch.text_input[batch.text_mask].tolist()]

    def _warn_once(self, caption: str) -> None:
        if not self._warned:
            log.warning("a caption is cut to text_length %d (%.40r...); further cuts are not reported",
                        self.config.text_length, caption)
            self._warned = True

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write vocab.json, merges.txt and config.json; the folder appears whole."""
        with atomic_folder(Path(folder), (VOCAB_NAME, MERGES_NAME, "config.json")) as aside:
            self.write_files(aside)
        return Path(folder)

    def write_files(self, folder: Path) -> None:
        """The three files into an existing folder."""
        (folder / VOCAB_NAME).write_text(self.vocab_text, encoding="utf-8", newline="")
        (folder / MERGES_NAME).write_text(self.merges_text, encoding="utf-8", newline="")
        write_config(KIND, self.config, folder)

    @classmethod
    def from_files(cls, vocab: Path, merges: Path, config: BPETokenizerConfig) -> BPETokenizer:
        """Made of the two files. UserError naming the file on any damage."""
        texts = read_text(vocab), read_text(merges)
        try:
            return cls(*texts, config)
        except UserError as error:
            raise UserError(f"{vocab.parent}: {error}") from None

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> BPETokenizer:
        """Load a folder that save_pretrained wrote. UserError naming the file on any damage."""
        path = Path(folder)
        return cls.from_files(path / VOCAB_NAME, path / MERGES_NAME, read_config(path, KIND, BPETokenizerConfig))


def read_text(path: Path) -> str:
    """A text file of bounded size as it is, line ends included."""
    if not path.is_file():
        raise MissingFileError(f"{path}: missing; copy the text tokenizer's files again")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes is too large for a vocabulary (limit {MAX_FILE_BYTES:,})")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None


def read_vocab(text: str) -> dict[str, int]:
    """vocab.json: piece -> id, every id once, with <s>, <pad>, </s> and <unk>."""
    try:
        vocab = json.loads(text)
        "".join(vocab).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{VOCAB_NAME} cannot be read: {one_line(error)[:200]}") from None
    if not isinstance(vocab, dict) or not all(type(number) is int and 0 <= number < MAX_ID for number in vocab.values()):
        raise UserError(f"{VOCAB_NAME} is not a mapping of pieces to ids")
    if len(set(vocab.values())) != len(vocab):
        raise UserError(f"{VOCAB_NAME} gives two pieces the same id")
    missing = [name for name in (BEGIN, PAD, END, UNKNOWN) if name not in vocab]
    if missing:
        raise UserError(f"{VOCAB_NAME} lacks {', '.join(missing)}, so it is not BART's kind of vocabulary")
    return vocab


def read_merges(text: str) -> list[tuple[str, str]]:
    """merges.txt: a line with its version, then a pair a line, the first to be merged first."""
    first, *lines = text.split("\n")
    if not first.startswith(HEADER):
        raise UserError(f"{MERGES_NAME} does not begin with a line '{HEADER}: ...', so it is not a list of merges")
    while lines and not lines[-1].strip():
        lines.pop()
    pairs = [tuple(line.split()) for line in lines]
    wrong = next((number for number, pair in enumerate(pairs) if len(pair) != 2), None)
    if wrong is not None:
        raise UserError(f"{MERGES_NAME}, line {wrong + 2}: expected two pieces, found {lines[wrong][:40]!r}")
    return [(left, right) for left, right in pairs]


def _check_ids(vocab: dict[str, int], merges: list[tuple[str, str]], vocab_size: int) -> None:
    """No caption may hold an id that the model has no row for; <mask> and its like may be beyond."""
    reachable = {BEGIN, PAD, END, UNKNOWN, *(piece for piece in vocab if len(piece) == 1),
                 *(left + right for left, right in merges)}
    beyond = [piece for piece in reachable if vocab.get(piece, 0) >= vocab_size]
    if beyond:
        raise UserError(f"{VOCAB_NAME} has ids up to {max(vocab[piece] for piece in beyond)}, the model reads {vocab_size} of "
                        "them; use the vocabulary that it was trained with")


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, str]], config: BPETokenizerConfig) -> Any:
    try:
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    except ImportError as error:
        raise UserError(f"a text tokenizer with splitting: bytes needs tokenizers ({error}): pip install "
                        "'tokenloom[text]'") from None
    needed = [*pre_tokenizers.ByteLevel.alphabet(), *(piece for pair in merges for piece in (*pair, "".join(pair)))]
    missing = sorted({piece for piece in needed if piece not in vocab})
    if missing:
        raise UserError(f"{VOCAB_NAME} lacks {len(missing)} pieces that {MERGES_NAME} or single bytes need "
                        f"({', '.join(missing[:5])}); the two files do not belong together")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=config.prefix_space)
    if config.lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def _as_ascii(caption: str) -> str:
    """Emoji become their names, everything lower case; other characters beyond ASCII are left out."""
    if not caption.isascii():
        try:
            from emoji import demojize
        except ImportError as error:
            raise UserError(f"a caption with characters beyond ASCII, which may be emoji, needs emoji ({error}): "
                            "pip install 'tokenloom[text]'") from None
        caption = demojize(caption, delimiters=("", ""))
    return caption.lower().encode("ascii", errors="ignore").decode()


def merge_pairs(pieces: Sequence[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Merge neighbours as long as there is a pair to merge: the one of the lowest rank first, the leftmost of equals
    (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909). A heap keeps a word of n characters at n log n steps."""
    held: list[str | None] = list(pieces)
    following = [*range(1, len(held)), -1]
    before = list(range(-1, len(held) - 1))
    heap: list[tuple[int, int, str, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0:
            pair = str(held[left]), str(held[right])
            if pair in ranks:
                heapq.heappush(heap, (ranks[pair], left, *pair))

    for left in range(len(held) - 1):
        offer(left, left + 1)
    while heap:
        _, left, first, second = heapq.heappop(heap)
        right = following[left]
        if held[left] != first or right < 0 or held[right] != second:
            continue  # one of the two has been merged since
        held[left], held[right] = first + second, None
        following[left] = following[right]
        if following[left] >= 0:
            before[following[left]] = left
        offer(before[left], left)
        offer(left, following[left])
    return [piece for piece in held if piece is not None]
