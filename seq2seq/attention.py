"""What image tokens see of the image: full, row, column and convolutional causal attention.

A sequence is a prefix (text, layout) that everything after it sees whole, and image slots in raster order. `visible` says
which image slot sees which; every implementation follows from it:

- `attend`: for CPU. Blocks of queries against the few keys that they see: no mask of all slots against all is made.
- `attend_flex`: for CUDA. The same through flex attention, which skips blocks that nobody sees.
- `Pattern.sees`: the rule for any slots, for decoding with a cache.

Row, column and convolutional attention are DALL-E's (Ramesh et al. 2021, appendix B.1, https://arxiv.org/abs/2102.12092).
"""

# Axes: B batch, H heads, G key/value heads, n slots, P prefix slots, m = n - P image slots, h w code grid, d head width

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_QUERIES = 128


@dataclass(frozen=True)
class Pattern:
    """One layer's attention: its name in PATTERNS, the prefix's length, the columns of the grid, the convolution's side."""

    name: str
    prefix: int
    columns: int
    convolution: int

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether image slot `query` sees image slot `key`, both raster indices of any (broadcastable) shape -> bool."""
        return (key <= query) & PATTERNS[self.name](self, query, key)

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether slot `query` of the whole sequence sees slot `key`, both of any (broadcastable) shape -> bool: every slot
        sees the prefix up to itself, image slots see what the pattern shows them of the image."""
        if self.name == "full":
            return key <= query
        within = (query >= self.prefix) & (key >= self.prefix)
        return (key <= query) & (~within | self.visible(query - self.prefix, key - self.prefix))

    def mask(self, slots: int) -> Tensor:
        """[slots, slots] bool, True = sees: for tests and short sequences."""
        at = torch.arange(slots)
        return self.sees(at[:, None], at[None, :])


def _full(pattern: Pattern, query: Tensor, key: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=query.device)


def _row(pattern: Pattern, query: Tensor, key: Tensor) -> Tensor:
    """The slots before it in raster order, back to the one above it."""
    return query - key <= pattern.columns


def _column(pattern: Pattern, query: Tensor, key: Tensor) -> Tensor:
    return query % pattern.columns == key % pattern.columns


def _convolution(pattern: Pattern, query: Tensor, key: Tensor) -> Tensor:
    reach, columns = pattern.convolution // 2, pattern.columns
    rows = query // columns - key // columns
    return (rows <= reach) & ((query % columns - key % columns).abs() <= reach)


def alone(shown: Tensor) -> Tensor:
    """shown [B, n] -> the slots [B, n] that see none up to themselves: padding on a caption's left. They are given themselves,
    or their softmax would be over nothing; as nobody sees them, it changes nothing else."""
    return ~shown.long().cumsum(dim=1).bool()


PATTERNS: dict[str, Callable[[Pattern, Tensor, Tensor], Tensor]] = {
    "full": _full, "row": _row, "column": _column, "convolution": _convolution}
"""Name -> which earlier image slots a slot sees."""


@lru_cache(maxsize=64)
def _blocks(pattern: Pattern, slots: int) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """(queries [q], keys [k], seen [q, k] or None where all are) of the sequence's slots, every query once."""
    prefix = torch.arange(min(pattern.prefix, slots))
    blocks: list[tuple[Tensor, Tensor, Tensor | None]] = []
    if len(prefix):
        blocks.append((prefix, prefix, torch.ones(len(prefix), len(prefix), dtype=torch.bool).tril()))
    for queries, keys in _groups(pattern, max(0, slots - pattern.prefix)):
        seen = pattern.visible(queries[:, None], keys[None, :])
        whole = torch.cat([torch.ones(len(queries), len(prefix), dtype=torch.bool), seen], dim=1)
        blocks.append((queries + len(prefix), torch.cat([prefix, keys + len(prefix)]), None if bool(seen.all()) else whole))
    return blocks


def _groups(pattern: Pattern, image_slots: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Image slots in groups of about BLOCK_QUERIES queries, each with the keys that any of them may see."""
    if not image_slots:
        return
    slots, columns = torch.arange(image_slots), pattern.columns
    if pattern.name == "column":
        rows = -(-image_slots // columns)
        together = max(1, BLOCK_QUERIES // rows)
        for first in range(0, columns, together):
            group = slots[(slots % columns >= first) & (slots % columns < first + together)]
            if len(group):
                yield group, group
        return
    back = {"row": columns, "convolution": pattern.convolution // 2 * (columns + 1)}.get(pattern.name, image_slots)
    step = max(1, BLOCK_QUERIES // columns) * columns  # whole rows
    for first in range(0, image_slots, step):
        last = min(image_slots, first + step)
        yield slots[first:last], slots[max(0, first - back): last]


def attend(pattern: Pattern, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None,
           dropout: float = 0.0) -> Tensor:
    """query [B, H, n, d], key and value [B, G, n, d] -> [B, H, n, d]; key_mask [B, P] bool hides slots of the prefix.

    n may be anything from 1 to P + N: what is not there is not seen.
    """
    slots, grouped = query.shape[-2], key.shape[1] != query.shape[1]
    if pattern.name == "full" and key_mask is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout, enable_gqa=grouped)
    parts, order = [], []
    for queries, keys, seen in _blocks(pattern, slots):
        mask = None if seen is None else seen.to(query.device)
        if key_mask is not None:
            shown = F.pad(key_mask[:, :slots], (0, max(0, len(keys) - pattern.prefix)), value=True)
            shown = shown[:, None, None, : len(keys)]  # [B, 1, 1, k]
            mask = shown.expand(-1, 1, len(queries), -1) if mask is None else shown & mask
            if int(queries[0]) < pattern.prefix:  # slots after the prefix are never hidden
                own = torch.eye(len(queries), dtype=torch.bool, device=query.device)
                mask = mask | own & alone(key_mask[:, :slots])[:, None, :, None]
        parts.append(F.scaled_dot_product_attention(_take(query, queries), _take(key, keys), _take(value, keys), attn_mask=mask,
                                                    dropout_p=dropout, enable_gqa=grouped))
        order.append(queries)
    if len(parts) == 1:
        return parts[0]
    together, at = torch.cat(parts, dim=2), torch.cat(order)
    return together if bool((at.diff() > 0).all()) else together[:, :, at.argsort().to(query.device)]


def _take(heads: Tensor, slots: Tensor) -> Tensor:
    """heads [B, H, n, d] at ascending `slots`: a view where they follow one another."""
    first, last = int(slots[0]), int(slots[-1])
    if last - first + 1 == len(slots):
        return heads[:, :, first: last + 1]
    return heads[:, :, slots.to(heads.device)]


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=64)
def _block_mask(pattern: Pattern, slots: int, device: str):
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return pattern.sees(query, key)

    return create_block_mask(seen, None, None, slots, slots, device=device)


def attend_flex(pattern: Pattern, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None,
                compiled: bool = True) -> Tensor:
    """`attend` without dropout through flex attention (Dong et al. 2024, https://arxiv.org/abs/2412.05496).

    Compiled it needs CUDA; `compiled=False` is its slow reference, which runs anywhere.
    """
    from torch.nn.attention.flex_attention import flex_attention

    slots, prefix = query.shape[-2], pattern.prefix
    hide = None
    if key_mask is not None:
        shown = F.pad(key_mask, (0, slots - prefix), value=True)  # [B, n]
        own = alone(shown)

        def hide(score: Tensor, batch: Tensor, head: Tensor, query_slot: Tensor, key_slot: Tensor) -> Tensor:
            seen = shown[batch, key_slot] | ((query_slot == key_slot) & own[batch, query_slot])
            return torch.where(seen, score, -torch.inf)

    run: Any = _compiled_flex() if compiled else flex_attention
    return run(query, key, value, score_mod=hide, block_mask=_block_mask(pattern, slots, str(query.device)),
               enable_gqa=key.shape[1] != query.shape[1])
