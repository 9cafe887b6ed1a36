"""Self- and cross-attention of the compiled decoder step."""

# Axes: M rows of the stream (R rows x s slots), H heads, G key/value heads, d head width, S slots,
#       T text slots

from __future__ import annotations

import numpy as np

from inference.decoder.native import tables as t
from inference.decoder.native.basics import (
    compiled_part,
    exponential,
    float32_at,
    int64_at,
    maximum,
    normalize,
    uint8_at,
)
from inference.decoder.native.products import multiply_floats
from inference.decoder.native.scratch import thread_scratch

HIDDEN_SCORE = np.float32(-3e38)  # exp is 0; -inf would give NaN where all slots are hidden


@compiled_part
def norm_and_rotate(step, head, gain_at, slot):
    """Apply QK norm (gain at `gain_at`, 0 = none) and `slot`'s rotary embedding to head [d]."""
    width = step[t.HEAD_DIM]
    if gain_at:
        normalize(head, head, width, t.RMS, float32_at(gain_at, width), np.float32(0))
    if step[t.ROTATIONS]:
        rotation = float32_at(step[t.ROTATIONS] + slot * width * 4, width)  # pairs of cosine, sine
        for pair in range(width // 2):
            real, imaginary = head[2 * pair], head[2 * pair + 1]
            cosine, sine = rotation[2 * pair], rotation[2 * pair + 1]
            head[2 * pair] = real * cosine - imaginary * sine
            head[2 * pair + 1] = real * sine + imaginary * cosine


@compiled_part
def attend(query, keys, values, count, width, out_at, scores_at, first_mask, second_mask):
    """out [d] = attention of one query to `count` keys and values [count, d].

    masks: addresses of `count` bytes, 1 = seen, or 0 for no mask.
    """
    scores = float32_at(scores_at, count)
    out = float32_at(out_at, width)
    rows = float32_at(values, count * width)

    # one row times the matrix of keys
    multiply_floats(keys, query, scores_at, (0, count), 1, (width, width, count))
    for mask in (first_mask, second_mask):
        if mask:
            seen = uint8_at(mask, count)
            for at in range(count):
                scores[at] = scores[at] if seen[at] else HIDDEN_SCORE

    # softmax, its division kept for the end; scores are scaled after the largest is subtracted
    scale = np.float32(1) / np.sqrt(np.float32(width))
    most, total = maximum(scores, count), np.float32(0)
    for at in range(count):
        scores[at] = exponential((scores[at] - most) * scale)
        total += scores[at]

    # weighted sum of values, four slots at a time: out is loaded and stored a quarter as often
    for lane in range(width):
        out[lane] = 0
    in_fours = count // 4 * 4
    for at in range(0, in_fours, 4):
        first, second, third, fourth = scores[at], scores[at + 1], scores[at + 2], scores[at + 3]
        start = at * width
        for lane in range(width):
            out[lane] += (first * rows[start + lane] + second * rows[start + width + lane]
                          + third * rows[start + 2 * width + lane]
                          + fourth * rows[start + 3 * width + lane])
    for at in range(in_fours, count):
        for lane in range(width):
            out[lane] += scores[at] * rows[at * width + lane]

    factor = np.float32(1) / total
    for lane in range(width):
        out[lane] *= factor


@compiled_part
def store_keys_values(step, layer, keys, values, row, group):
    """Put one key/value head of a row's s slots into its cache at addresses keys and values."""
    width, heads, groups = step[t.HEAD_DIM], step[t.HEADS], step[t.KV_HEADS]
    heads_in = heads + 2 * groups
    slots = int64_at(step[t.ROW_SLOTS], step[t.ROWS])
    gains = layer[t.SELF_HEAD_GAINS]
    for stream in range(row * step[t.SLOTS_PER_ROW], (row + 1) * step[t.SLOTS_PER_ROW]):
        slot = slots[stream]
        key_at = (stream * heads_in + heads + group) * width * 4
        key = float32_at(step[t.HEADS_IN] + key_at, width)
        value = float32_at(step[t.HEADS_IN] + key_at + groups * width * 4, width)
        norm_and_rotate(step, key, gains + (heads + group) * width * 4 if gains else 0, slot)
        kept_key = float32_at(keys + slot * width * 4, width)
        kept_value = float32_at(values + slot * width * 4, width)
        for lane in range(width):
            kept_key[lane] = key[lane]
            kept_value[lane] = value[lane]


@compiled_part
def self_attention(step, thread, layer, layer_number, row, group):
    """Store one key/value head of a row's s slots, then attend with the queries that share it."""
    width, heads, groups = step[t.HEAD_DIM], step[t.HEADS], step[t.KV_HEADS]
    row_start = layer_number * step[t.LAYER_STRIDE] + row * step[t.ROW_STRIDE]
    head_bytes = (row_start + group * step[t.SLOTS] * width) * 4
    keys, values = step[t.KEYS] + head_bytes, step[t.VALUES] + head_bytes
    store_keys_values(step, layer, keys, values, row, group)

    slots = int64_at(step[t.ROW_SLOTS], step[t.ROWS])
    gains = layer[t.SELF_HEAD_GAINS]
    scores = thread_scratch(step, thread)[3]
    seen = step[t.SEEN] + row * step[t.SLOTS] if step[t.SEEN] else 0
    queries_per_group = heads // groups
    for stream in range(row * step[t.SLOTS_PER_ROW], (row + 1) * step[t.SLOTS_PER_ROW]):
        slot = slots[stream]
        pattern = layer[t.PATTERN] + slot * step[t.SLOTS] if layer[t.PATTERN] else 0
        for head in range(group * queries_per_group, (group + 1) * queries_per_group):
            query = step[t.HEADS_IN] + (stream * (heads + 2 * groups) + head) * width * 4
            gain = gains + head * width * 4 if gains else 0
            norm_and_rotate(step, float32_at(query, width), gain, slot)
            out = step[t.HEADS_OUT] + (stream * heads + head) * width * 4
            attend(query, keys, values, slot + 1, width, out, scores, seen, pattern)


@compiled_part
def cross_attention(step, thread, layer, layer_number, row, head):
    """One head of one row: attend with the queries of its s slots to the row's caption."""
    width, heads = step[t.HEAD_DIM], step[t.HEADS]
    rows = step[t.ROWS] // step[t.SLOTS_PER_ROW]
    length = int64_at(step[t.TEXT_LENGTHS], rows)[row]
    seen = int64_at(step[t.TEXT_SEEN], rows)[row]

    group = head // (heads // step[t.KV_HEADS])
    to_group = group * int64_at(step[t.TEXT_STRIDES], rows)[row] * 4
    # addresses of keys [R], then of values [R]
    text = int64_at(step[t.TEXT] + layer_number * 2 * rows * 8, 2 * rows)
    keys, values = text[row] + to_group, text[rows + row] + to_group

    gains = layer[t.CROSS_HEAD_GAINS]
    scores = thread_scratch(step, thread)[3]
    for stream in range(row * step[t.SLOTS_PER_ROW], (row + 1) * step[t.SLOTS_PER_ROW]):
        # HEADS_IN holds queries alone here, so that it has the shape of HEADS_OUT
        at = (stream * heads + head) * width * 4
        query = step[t.HEADS_IN] + at
        if gains:
            gain, query_head = float32_at(gains + head * width * 4, width), float32_at(query, width)
            normalize(query_head, query_head, width, t.RMS, gain, np.float32(0))
        attend(query, keys, values, length, width, step[t.HEADS_OUT] + at, scores, seen, 0)
