"""What compiled steps read: tables of int64 that hold sizes and addresses."""

from __future__ import annotations

# A matrix [O, I] of float32, or of int8 with a scale an output (divided by 127); addresses are 0 where there is nothing
WEIGHT, SCALE, BIAS, OUTPUTS, INPUTS = range(5)
MATRIX = 5

# A norm: the addresses of its gain and its bias, its kind, and the bits of a float32 that is added under the root (of an RMS
# norm, whose gain holds the root of the width, times the width)
GAIN, NORM_BIAS, KIND, EPSILON = range(4)
NORM = 4
NO_NORM, RMS, LAYER_NORM = range(3)

# Activations of the feed-forward block
SILU, GELU = range(2)

# A layer: where its norms, matrices, gains of heads and pattern begin
SELF_NORM = 0
QKV = SELF_NORM + NORM
SELF_HEADS = QKV + MATRIX
PATTERN = SELF_HEADS + 1  # [S, S] bytes, which slot sees which; 0: all before it
SELF_OUT = PATTERN + 1
SELF_AFTER = SELF_OUT + MATRIX
CROSS_NORM = SELF_AFTER + NORM
CROSS_QUERY = CROSS_NORM + NORM
CROSS_HEADS = CROSS_QUERY + MATRIX
CROSS_OUT = CROSS_HEADS + 1
CROSS_AFTER = CROSS_OUT + MATRIX
FEED_NORM = CROSS_AFTER + NORM
FEED_UP = FEED_NORM + NORM
FEED_INNER = FEED_UP + MATRIX
FEED_OUT = FEED_INNER + NORM
FEED_AFTER = FEED_OUT + MATRIX
NOTHING = FEED_AFTER + NORM  # where no norm is
LAYER = NOTHING + NORM

# A step: the model ...
(LAYERS, LAYER_COUNT, WIDTH, HEADS, KV_HEADS, HEAD_DIM, CROSSES, GATED, ACTIVATION, INT8, FINAL_NORM, _, _, _,
 TO_LOGITS, _, _, _, _,
 TURNS,  # cosines and sines [S, d / 2, 2]
 # ... the rows and what they keep ...
 ROWS,  # M
 AT_ONCE,  # s
 AT,  # slots [M] int64
 KEYS, VALUES, LAYER_STRIDE, ROW_STRIDE, SLOTS,  # [layers, R, G, S, d], strides in numbers
 SEEN,  # [R, S] bytes
 TEXT,  # addresses [layers, 2, R] of keys and of values [G, T, d]
 TEXT_LENGTHS,  # T of each row [R]
 TEXT_STRIDES,  # numbers from one head to the next, of each row [R]
 TEXT_SEEN,  # address of [T] bytes, of each row [R]
 # ... and buffers
 HIDDEN,  # [M, D], in and out
 LOGITS,  # [M, K], out
 HEADS_IN,  # [M, (H + 2G) d]
 HEADS_OUT,  # [M, H d]
 INNER,  # [M, O of the feed-forward block's first matrix]
 AFTER,  # [M, D]
 PRIVATE, PRIVATE_BYTES,  # of each thread
 MOST_INPUTS,  # I of the widest matrix
 STEP) = range(43)
