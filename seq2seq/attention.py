"""Causal attention patterns of image tokens: full, row, column and convolution.

A sequence is a prefix (text, layout), which every later slot sees whole, then image slots in raster
order. `Pattern` says which slot sees which; the two implementations follow from it:

- `attend` for the CPU: blocks of queries against the few keys they see, without an n x n mask.
- `attend_flex` for CUDA: flex attention, which skips blocks that no query sees.

Row, column and convolutional attention are DALL-E's (Ramesh et al. 2021, appendix B.1,
https://arxiv.org/abs/2102.12092).
"""

# Axes: B batch, H heads, G key/value heads, n slots, P prefix slots, h w code grid, d head width,
#       q queries and k keys of a block

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_QUERIES = 128  # flex attention's default too
"""Queries per block of `attend`, rounded down to whole rows or columns (at least one)."""


@dataclass(frozen=True)
class Pattern:
    """Attention pattern of one layer.

    name: a key of PATTERNS; prefix: slots before the image; columns: of the code grid;
    convolution: side of the neighbourhood of 'convolution'.
    """

    name: str
    prefix: int
    columns: int
    convolution: int

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether image slot `query` sees image slot `key`: broadcastable indices -> bool."""
        return (key <= query) & PATTERNS[self.name](self, query, key)

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether slot `query` of the sequence sees slot `key`: broadcastable indices -> bool."""
        causal = key <= query
        if self.name == "full":
            return causal
        # the pattern is for pairs within the image; others are causal only
        both_in_image = (query >= self.prefix) & (key >= self.prefix)
        visible = self.visible(query - self.prefix, key - self.prefix)
        return causal & (~both_in_image | visible)

    def mask(self, slots: int) -> Tensor:
        """Return the dense mask [slots, slots], True = sees. For tests and short sequences."""
        indices = torch.arange(slots)
        return self.sees(indices[:, None], indices[None, :])


def _full(pattern: Pattern, query: Tensor, key: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=query.device)  # `visible` adds causality


def _row(pattern: Pattern, query: Tensor, key: Tensor) -> Tensor:
    """The previous slots in raster order, back to the one right above the query."""
    return query - key <= pattern.columns


def _column(pattern: Pattern, query: Tensor, key: Tensor) -> Tensor:
    return query % pattern.columns == key % pattern.columns


def _convolution(pattern: Pattern, query: Tensor, key: Tensor) -> Tensor:
    reach, columns = pattern.convolution // 2, pattern.columns
    row_distance = query // columns - key // columns  # never negative where key <= query
    column_distance = (query % columns - key % columns).abs()
    return (row_distance <= reach) & (column_distance <= reach)


PATTERNS: dict[str, Callable[[Pattern, Tensor, Tensor], Tensor]] = {
    "full": _full, "row": _row, "column": _column, "convolution": _convolution}
"""Name -> which earlier image slots a slot sees."""


def alone(key_mask: Tensor) -> Tensor:
    """key_mask [B, n] -> slots [B, n] that see no real slot up to themselves: left padding.

    Such a slot is made to see itself, or its softmax would be NaN. No other slot sees it, so
    nothing else changes.
    """
    return ~key_mask.long().cumsum(dim=1).bool()


# ---- blocks of queries, for the CPU

class QueryBlock(NamedTuple):
    """Slot indices queries [q] and keys [k]; seen [q, k] bool, None if all see all."""

    queries: Tensor
    keys: Tensor
    seen: Tensor | None


# built once: every layer and step asks for the same few patterns and lengths
@lru_cache(maxsize=64)
def _blocks(pattern: Pattern, slots: int) -> list[QueryBlock]:
    """Blocks with every slot once as a query: the prefix, then groups of image slots."""
    prefix = torch.arange(min(pattern.prefix, slots))
    blocks = []
    if len(prefix):
        causal = torch.ones(len(prefix), len(prefix), dtype=torch.bool).tril()
        blocks.append(QueryBlock(prefix, prefix, causal))

    image_slots = max(0, slots - pattern.prefix)
    groups = _column_groups if pattern.name == "column" else _raster_groups
    for queries, keys in groups(pattern, image_slots):
        seen = pattern.visible(queries[:, None], keys[None, :])  # [q, k of the image]
        mask = None  # the kernel then reads none
        if not bool(seen.all()):
            seen_prefix = torch.ones(len(queries), len(prefix), dtype=torch.bool)
            mask = torch.cat([seen_prefix, seen], dim=1)
        keys = torch.cat([prefix, keys + len(prefix)])
        blocks.append(QueryBlock(queries + len(prefix), keys, mask))
    return blocks


def _column_groups(pattern: Pattern, image_slots: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(queries, keys) of whole columns: those of a column see nothing outside it."""
    columns = pattern.columns
    rows = -(-image_slots // columns)  # the last one may be incomplete
    columns_per_block = max(1, BLOCK_QUERIES // max(1, rows))  # no rows: no groups either

    slots = torch.arange(image_slots)
    column = slots % columns
    for first in range(0, columns, columns_per_block):
        group = slots[(column >= first) & (column < first + columns_per_block)]
        if len(group):
            yield group, group


def _raster_groups(pattern: Pattern, image_slots: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(queries, keys) of whole rows; the keys go back to the first one any query may see."""
    columns = pattern.columns
    reach = pattern.convolution // 2
    # in raster order; a convolution reaches `reach` rows up and `reach` columns to the left
    lookback = {"row": columns, "convolution": reach * (columns + 1)}.get(pattern.name, image_slots)

    slots = torch.arange(image_slots)
    step = max(1, BLOCK_QUERIES // columns) * columns
    for first in range(0, image_slots, step):
        last = min(image_slots, first + step)
        yield slots[first:last], slots[max(0, first - lookback): last]


def attend(pattern: Pattern, query: Tensor, key: Tensor, value: Tensor,
           key_mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """query [B, H, n, d], key and value [B, G, n, d] -> [B, H, n, d], n from 1 to P + N.

    key_mask: [B, P] bool, False hides a slot of the prefix.
    """
    slots = query.shape[-2]
    grouped = key.shape[1] != query.shape[1]
    if pattern.name == "full" and key_mask is None:
        # the kernel's own causal mask: no mask tensor, and half of the work skipped
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout,
                                              enable_gqa=grouped)

    # blocks are joined at the end, not written into one tensor, so that autograd follows
    outputs, order = [], []
    for block in _blocks(pattern, slots):
        mask = _block_mask(pattern, block, query, key_mask)
        output = F.scaled_dot_product_attention(
            _select(query, block.queries), _select(key, block.keys), _select(value, block.keys),
            attn_mask=mask, dropout_p=dropout, enable_gqa=grouped)
        outputs.append(output)
        order.append(block.queries)
    if len(outputs) == 1:
        return outputs[0]

    output, queries = torch.cat(outputs, dim=2), torch.cat(order)
    in_raster_order = bool((queries.diff() > 0).all())  # blocks of columns are not
    return output if in_raster_order else output[:, :, queries.argsort().to(query.device)]


def _block_mask(pattern: Pattern, block: QueryBlock, query: Tensor,
                key_mask: Tensor | None) -> Tensor | None:
    """Attention mask of a block, [q, k] or [B, 1, q, k] bool; None if nothing is hidden."""
    mask = None if block.seen is None else block.seen.to(query.device)
    if key_mask is None:
        return mask

    key_mask = key_mask[:, : query.shape[-2]]
    image_keys = max(0, len(block.keys) - pattern.prefix)
    shown = F.pad(key_mask, (0, image_keys), value=True)
    shown = shown[:, None, None, : len(block.keys)]  # [B, 1, 1, k]
    mask = shown.expand(-1, 1, len(block.queries), -1) if mask is None else shown & mask

    # a slot that sees no key can only be padding of the prefix, which is a block of its own
    if int(block.queries[0]) < pattern.prefix:
        itself = torch.eye(len(block.queries), dtype=torch.bool, device=query.device)
        mask = mask | itself & alone(key_mask)[:, None, :, None]
    return mask


def _select(heads: Tensor, slots: Tensor) -> Tensor:
    """heads [B, H, n, d] at ascending `slots`: a view where they are contiguous, else a copy."""
    first, last = int(slots[0]), int(slots[-1])
    if last - first + 1 == len(slots):
        return heads[:, :, first: last + 1]
    return heads[:, :, slots.to(heads.device)]


# ---- flex attention, for CUDA

@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # not compiled it computes all scores; one compiled function for all layers shares its kernels
    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=64)
def _flex_block_mask(pattern: Pattern, slots: int, device: str):
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return pattern.sees(query, key)

    return create_block_mask(seen, None, None, slots, slots, device=device)


def attend_flex(pattern: Pattern, query: Tensor, key: Tensor, value: Tensor,
                key_mask: Tensor | None = None, compiled: bool = True) -> Tensor:
    """`attend` without dropout, by flex attention.

    Dong et al. 2024, https://arxiv.org/abs/2412.05496. Compiled it needs CUDA; `compiled=False` is
    its slow reference, which runs anywhere.
    """
    from torch.nn.attention.flex_attention import flex_attention

    slots, prefix = query.shape[-2], pattern.prefix
    score_mod = None
    # padding differs in every batch: as a score_mod it leaves the block mask cacheable per pattern
    if key_mask is not None:
        shown = F.pad(key_mask, (0, slots - prefix), value=True)  # [B, n]
        hides_all = alone(shown)

        def score_mod(score: Tensor, batch: Tensor, head: Tensor, query_slot: Tensor,
                      key_slot: Tensor) -> Tensor:
            itself = (query_slot == key_slot) & hides_all[batch, query_slot]
            return torch.where(shown[batch, key_slot] | itself, score, -torch.inf)

    run: Any = _compiled_flex() if compiled else flex_attention
    block_mask = _flex_block_mask(pattern, slots, str(query.device))
    grouped = key.shape[1] != query.shape[1]
    return run(query, key, value, score_mod=score_mod, block_mask=block_mask, enable_gqa=grouped)
