"""Two ways of splitting a caption into the pieces of a published byte-pair vocabulary.

- `ByteLevelSplitter`: GPT-2's byte level (Radford et al. 2019), as BartTokenizer, which DALL-E mini
  trains with;
- `SpaceSplitter`: min-dalle's, which reads ASCII alone: emoji by their names, lower case, words
  between spaces.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from tokenloom_common.errors import UserError
from tokenloom_common.extras import require_extra

Merges = list[tuple[str, str]]
"""Pairs of pieces to merge, the first pair first."""
SPACE = chr(ord(" ") + 256)  # GPT-2 moves bytes that cannot be printed up by 256
"""How a byte-level vocabulary writes a space."""


class ByteLevelSplitter:
    """GPT-2's byte level, by the library `tokenizers`."""

    def __init__(self, vocab: dict[str, int], merges: Merges, lowercase: bool,
                 prefix_space: bool) -> None:
        """UserError without `tokenizers`, or when the vocabulary lacks a piece that it needs."""
        tokenizers = require_extra("tokenizers", "a text tokenizer with splitting: bytes", "text")
        pre_tokenizers = tokenizers.pre_tokenizers

        needed = set(pre_tokenizers.ByteLevel.alphabet())
        for left, right in merges:
            needed |= {left, right, left + right}
        # `tokenizers` would panic at such a merge, and drop such a byte without a word
        missing = sorted(needed - set(vocab))
        if missing:
            raise UserError(f"vocab.json lacks {len(missing)} pieces that merges.txt or single "
                            f"bytes need ({', '.join(missing[:5])}); the two files do not belong "
                            "together")

        self._tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
        if lowercase:
            self._tokenizer.normalizer = tokenizers.normalizers.Lowercase()

    def ids(self, caption: str, enough: int) -> list[int]:
        """Return the ids of a whole caption; `enough` is SpaceSplitter's."""
        # lone surrogates have no UTF-8; names of special pieces in a caption are plain text
        clean = caption.encode("utf-8", "replace").decode()
        return self._tokenizer.encode(clean, add_special_tokens=False).ids


class SpaceSplitter:
    """min-dalle's splitting: words between spaces, in lower case and ASCII.

    Not by `tokenizers`: a caption in ASCII needs no optional package.
    """

    def __init__(self, vocab: dict[str, int], merges: Merges, unknown: int) -> None:
        """unknown: id of pieces that the vocabulary lacks."""
        self._vocab, self._unknown = vocab, unknown
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}

    def ids(self, caption: str, enough: int) -> list[int]:
        """Return the first `enough` ids of a caption of any length, or a few more."""
        # stops at `enough`: Python's merging of a text without end would take long
        ids: list[int] = []
        for word in _as_ascii(caption).split(" "):
            if word:  # two spaces in a row have nothing between them
                pieces = merge_pairs([SPACE, *word], self._ranks)
                ids += [self._vocab.get(piece, self._unknown) for piece in pieces]
            if len(ids) >= enough:
                break
        return ids


def _as_ascii(caption: str) -> str:
    """Lower case, emoji by their names, other characters beyond ASCII left out."""
    if not caption.isascii():  # imported only for captions that need it
        purpose = "a caption with characters beyond ASCII, which may be emoji,"
        emoji = require_extra("emoji", purpose, "text")
        caption = emoji.demojize(caption, delimiters=("", ""))
    return caption.lower().encode("ascii", errors="ignore").decode()


def merge_pairs(pieces: Sequence[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Merge neighbours until no pair has a rank: the lowest rank first, the leftmost of equals.

    Sennrich et al. 2016, https://arxiv.org/abs/1508.07909. A heap of candidate pairs keeps a word
    of n characters at n log n steps.
    """
    # a doubly linked list: merging keeps the left piece and empties the right one
    merged: list[str | None] = list(pieces)
    following = [*range(1, len(merged)), -1]
    previous = list(range(-1, len(merged) - 1))
    heap: list[tuple[int, int, str, str]] = []  # rank, index of the left piece, the pair

    def offer(left: int, right: int) -> None:
        if left < 0 or right < 0:
            return
        pair = str(merged[left]), str(merged[right])
        if pair in ranks:
            heapq.heappush(heap, (ranks[pair], left, *pair))

    for left in range(len(merged) - 1):
        offer(left, left + 1)

    while heap:
        _, left, first, second = heapq.heappop(heap)
        right = following[left]
        # entries are never removed from the heap: skip pairs that another merge has changed
        outdated = merged[left] != first or right < 0 or merged[right] != second
        if outdated:
            continue

        merged[left], merged[right] = first + second, None
        after = following[right]
        following[left] = after
        if after >= 0:
            previous[after] = left
        offer(previous[left], left)
        offer(left, after)
    return [piece for piece in merged if piece is not None]
