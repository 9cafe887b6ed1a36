"""Self- and cross-attention of the compiled decoder step."""

from __future__ import annotations

import numpy as np

from inference.decoder.native import tables as t
from inference.decoder.native.basics import (
    compiled_part,
    exponential,
    floats,
    largest,
    longs,
    normed,
    whole_bytes,
)
from inference.decoder.native.matrices import (
    private_parts,
)
from inference.decoder.native.products import multiply_floats

HIDDEN_SCORE = np.float32(-3e38)  # exp of it is 0; minus infinity less minus infinity would be no number


@compiled_part
def turn_head(step, head, gain_at, slot):
    """A head [d] in place: its norm (gain at `gain_at`), and rotary by its slot's cosines and sines."""
    width = step[t.HEAD_DIM]
    if gain_at:
        normed(head, head, width, t.RMS, floats(gain_at, width), np.float32(0))
    if step[t.TURNS]:
        angles = floats(step[t.TURNS] + slot * width * 4, width)
        for pair in range(width // 2):
            real, imaginary = head[2 * pair], head[2 * pair + 1]
            cosine, sine = angles[2 * pair], angles[2 * pair + 1]
            head[2 * pair] = real * cosine - imaginary * sine
            head[2 * pair + 1] = real * sine + imaginary * cosine


@compiled_part
def attend(query, keys, values, count, width, out_at, scores_at, first_mask, second_mask):
    """out [d] = attention of a query to `count` keys and values [count, d]; masks: addresses of bytes, 1 = seen, or 0."""
    scores, out, rows = floats(scores_at, count), floats(out_at, width), floats(values, count * width)
    multiply_floats(keys, query, scores_at, (0, count), 1, (width, width, count))
    for mask in (first_mask, second_mask):
        if mask:
            seen = whole_bytes(mask, count)
            for at in range(count):
                scores[at] = scores[at] if seen[at] else HIDDEN_SCORE
    scale = np.float32(1) / np.sqrt(np.float32(width))
    most, total = largest(scores, count), np.float32(0)
    for at in range(count):
        scores[at] = exponential((scores[at] - most) * scale)
        total += scores[at]
    for lane in range(width):
        out[lane] = 0
    whole = count // 4 * 4
    for at in range(0, whole, 4):
        first, second, third, fourth = scores[at], scores[at + 1], scores[at + 2], scores[at + 3]
        start = at * width
        for lane in range(width):
            out[lane] += (first * rows[start + lane] + second * rows[start + width + lane]
                          + third * rows[start + 2 * width + lane] + fourth * rows[start + 3 * width + lane])
    for at in range(whole, count):
        for lane in range(width):
            out[lane] += scores[at] * rows[at * width + lane]
    factor = np.float32(1) / total
    for lane in range(width):
        out[lane] *= factor


@compiled_part
def attend_to_row(step, number, layer, at, row, group):
    """One head of keys and values of one row: its s new slots into the cache, then its queries' attention."""
    width, heads, groups, at_once = step[t.HEAD_DIM], step[t.HEADS], step[t.KV_HEADS], step[t.AT_ONCE]
    both, slots = heads + 2 * groups, longs(step[t.AT], step[t.ROWS])
    start = (at * step[t.LAYER_STRIDE] + row * step[t.ROW_STRIDE] + group * step[t.SLOTS] * width) * 4
    keys, values = step[t.KEYS] + start, step[t.VALUES] + start
    gain = layer[t.SELF_HEADS]
    for once in range(at_once):
        stream = row * at_once + once
        slot = slots[stream]
        key = floats(step[t.HEADS_IN] + (stream * both + heads + group) * width * 4, width)
        value = floats(step[t.HEADS_IN] + (stream * both + heads + groups + group) * width * 4, width)
        turn_head(step, key, gain + (heads + group) * width * 4 if gain else 0, slot)
        kept_key, kept_value = floats(keys + slot * width * 4, width), floats(values + slot * width * 4, width)
        for lane in range(width):
            kept_key[lane] = key[lane]
            kept_value[lane] = value[lane]
    scores = private_parts(step, number)[3]
    seen = step[t.SEEN] + row * step[t.SLOTS] if step[t.SEEN] else 0
    each = heads // groups
    for once in range(at_once):
        stream = row * at_once + once
        slot = slots[stream]
        pattern = layer[t.PATTERN] + slot * step[t.SLOTS] if layer[t.PATTERN] else 0
        for head in range(group * each, (group + 1) * each):
            query = step[t.HEADS_IN] + (stream * both + head) * width * 4
            turn_head(step, floats(query, width), gain + head * width * 4 if gain else 0, slot)
            attend(query, keys, values, slot + 1, width, step[t.HEADS_OUT] + (stream * heads + head) * width * 4, scores, seen,
                   pattern)


@compiled_part
def attend_to_caption(step, number, layer, at, row, head):
    """One head's queries of one row: their attention to the row's caption."""
    width, heads, at_once, rows = step[t.HEAD_DIM], step[t.HEADS], step[t.AT_ONCE], step[t.ROWS] // step[t.AT_ONCE]
    length, seen = longs(step[t.TEXT_LENGTHS], rows)[row], longs(step[t.TEXT_SEEN], rows)[row]
    group = head // (heads // step[t.KV_HEADS])
    text = longs(step[t.TEXT] + at * 2 * rows * 8, 2 * rows)
    to_group = group * longs(step[t.TEXT_STRIDES], rows)[row] * 4
    keys, values = text[row] + to_group, text[rows + row] + to_group
    gain, scores = layer[t.CROSS_HEADS], private_parts(step, number)[3]
    for stream in range(row * at_once, (row + 1) * at_once):
        place = (stream * heads + head) * width * 4
        query = step[t.HEADS_IN] + place
        if gain:
            normed(floats(query, width), floats(query, width), width, t.RMS, floats(gain + head * width * 4, width),
                   np.float32(0))
        attend(query, keys, values, length, width, step[t.HEADS_OUT] + place, scores, seen, 0)
