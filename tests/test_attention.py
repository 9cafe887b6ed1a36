"""Attention patterns: what each sees, and that blocks, flex attention and a plain mask agree."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seq2seq import attention
from seq2seq.attention import PATTERNS, Pattern, attend, attend_flex

SEEN_BY_SLOT_10_OF_4_COLUMNS = {  # row 2, column 2
    "full": list(range(11)), "row": [6, 7, 8, 9, 10], "column": [2, 6, 10], "convolution": [5, 6, 7, 9, 10]}


@pytest.mark.parametrize("name", PATTERNS)
def test_what_one_slot_sees(name):
    pattern = Pattern(name, prefix=3, columns=4, convolution=3)
    seen = pattern.sees(torch.tensor(13), torch.arange(20)).nonzero().flatten()
    assert seen.tolist() == [0, 1, 2, *(slot + 3 for slot in SEEN_BY_SLOT_10_OF_4_COLUMNS[name])]
    assert set(SEEN_BY_SLOT_10_OF_4_COLUMNS) == set(PATTERNS)


@pytest.mark.parametrize("name", PATTERNS)
def test_the_prefix_is_causal_and_seen_whole_and_the_image_follows_the_pattern(name):
    pattern = Pattern(name, prefix=2, columns=5, convolution=5)
    mask = pattern.mask(2 + 17)
    assert torch.equal(mask[:2], torch.ones(2, 19, dtype=torch.bool).tril()[:2])
    assert mask[2:, :2].all()
    image = torch.arange(17)
    assert torch.equal(mask[2:, 2:], pattern.visible(image[:, None], image[None, :]))


def plain(pattern, query, key, value, key_mask):
    slots = query.shape[2]
    mask = pattern.mask(slots)[None, None].expand(len(query), 1, -1, -1)
    if key_mask is not None:
        mask = mask & F.pad(key_mask, (0, max(0, slots - pattern.prefix)), value=True)[:, None, None, :slots]
        mask = mask | ~mask.any(dim=-1, keepdim=True) & torch.eye(slots, dtype=torch.bool)
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ value


def heads(slots: int, kv_heads: int = 4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, count, slots, 16, generator=generator, requires_grad=True) for count in (4, kv_heads, kv_heads)]


CASES = [(prefix, rows, columns, missing) for prefix, rows, columns, missing in
         ((0, 4, 4, 0), (1, 5, 3, 0), (6, 4, 5, 1), (6, 3, 4, 12), (3, 40, 6, 2))]


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padded", [None, "right", "left"])
def test_blocks_equal_a_plain_mask_with_gradients(name, case, padded, monkeypatch):
    prefix, rows, columns, missing = case
    monkeypatch.setattr(attention, "BLOCK_QUERIES", 16)
    attention._blocks.cache_clear()
    pattern = Pattern(name, prefix, columns, 3)
    parts = heads(prefix + rows * columns - missing, kv_heads=2)
    key_mask = None
    if padded and prefix:
        key_mask = torch.tensor([[True] * prefix, [True, *[False] * (prefix - 1)]])
        key_mask = key_mask.flip(1) if padded == "left" else key_mask
    ours, theirs = attend(pattern, *parts, key_mask), plain(pattern, *parts, key_mask)
    assert (ours - theirs).abs().max() < 1e-5
    weights = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad((ours * weights).sum(), parts), torch.autograd.grad((theirs * weights).sum(), parts),
                    strict=True):
        assert (a - b).abs().max() < 1e-4
    attention._blocks.cache_clear()


@pytest.mark.long
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("padded", [None, "right", "left"])
def test_flex_attention_equals_a_plain_mask(name, padded):
    pattern = Pattern(name, 6, 5, 3)
    parts = [part.detach() for part in heads(6 + 19)]
    key_mask = torch.tensor([[True] * 6, [True, True, False, False, False, False]]) if padded else None
    key_mask = key_mask.flip(1) if padded == "left" else key_mask
    assert (attend_flex(pattern, *parts, key_mask, compiled=False) - plain(pattern, *parts, key_mask)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["row", "column", "convolution"])
def test_no_mask_of_all_slots_against_all_is_made(name):
    pattern = Pattern(name, 64, 32, 11)
    largest = max(seen.numel() for _, _, seen in attention._blocks(pattern, 64 + 1024) if seen is not None)
    assert largest < 1088 * 1088 / 4
    queries = torch.cat([queries for queries, _, _ in attention._blocks(pattern, 64 + 1024)])
    assert torch.equal(queries.sort().values, torch.arange(1088))


def test_dropout_drops():
    pattern = Pattern("row", 2, 4, 3)
    parts = heads(2 + 16)
    torch.manual_seed(0)
    assert not torch.allclose(attend(pattern, *parts, dropout=0.5), attend(pattern, *parts))
