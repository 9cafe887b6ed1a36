"""Tables of int64 that compiled steps read: sizes, and addresses (0 where there is nothing)."""

from __future__ import annotations

# A matrix [O, I] of float32, or of int8 with one scale per output (divided by 127)
WEIGHT, SCALE, BIAS, OUTPUTS, INPUTS = range(5)
MATRIX_SIZE = 5

# A norm: addresses of its gain and bias, its kind, and the bits of the float32 that is added under
# the root. An RMS norm is computed without the mean: its gain includes sqrt(D), and its epsilon is
# multiplied by D.
GAIN, NORM_BIAS, KIND, EPSILON = range(4)
NORM_SIZE = 4
NO_NORM, RMS, LAYER_NORM = range(3)

# Activations of the feed-forward block
SILU, GELU = range(2)

# A layer: offsets of its norms, matrices, head gains and attention pattern
SELF_NORM = 0
QKV = SELF_NORM + NORM_SIZE
SELF_HEAD_GAINS = QKV + MATRIX_SIZE
PATTERN = SELF_HEAD_GAINS + 1  # [S, S] bytes, which slot sees which; 0: each sees all before it
SELF_OUT = PATTERN + 1
SELF_NORM_AFTER = SELF_OUT + MATRIX_SIZE
CROSS_NORM = SELF_NORM_AFTER + NORM_SIZE
CROSS_QUERY = CROSS_NORM + NORM_SIZE
CROSS_HEAD_GAINS = CROSS_QUERY + MATRIX_SIZE
CROSS_OUT = CROSS_HEAD_GAINS + 1
CROSS_NORM_AFTER = CROSS_OUT + MATRIX_SIZE
FEED_NORM = CROSS_NORM_AFTER + NORM_SIZE
FEED_UP = FEED_NORM + NORM_SIZE
FEED_INNER_NORM = FEED_UP + MATRIX_SIZE
FEED_OUT = FEED_INNER_NORM + NORM_SIZE
FEED_NORM_AFTER = FEED_OUT + MATRIX_SIZE
IDENTITY = FEED_NORM_AFTER + NORM_SIZE  # kind NO_NORM, for places that never have a norm
LAYER_SIZE = IDENTITY + NORM_SIZE

# A step. Each `_` is a further entry of the norm or matrix before it.
(
    # the model
    LAYERS, LAYER_COUNT, WIDTH, HEADS, KV_HEADS, HEAD_DIM, CROSSES, GATED, ACTIVATION, INT8,
    FINAL_NORM, _, _, _,
    TO_LOGITS, _, _, _, _,
    ROTATIONS,  # cosines and sines [S, d / 2, 2]
    # rows and caches
    ROWS,  # M
    SLOTS_PER_ROW,  # s
    ROW_SLOTS,  # slot [M] int64 of each row of the stream
    KEYS, VALUES, LAYER_STRIDE, ROW_STRIDE, SLOTS,  # [layers, R, G, S, d], strides in numbers
    SEEN,  # [R, S] bytes
    TEXT,  # addresses [layers, 2, R] of keys and of values [G, T, d]
    TEXT_LENGTHS,  # T of each row [R]
    TEXT_STRIDES,  # numbers from one head to the next, of each row [R]
    TEXT_SEEN,  # address of [T] bytes, of each row [R]
    # buffers
    HIDDEN,  # [M, D], in and out
    LOGITS,  # [M, K], out
    HEADS_IN,  # [M, (H + 2G) d]
    HEADS_OUT,  # [M, H d]
    INNER,  # [M, O of the feed-forward block's first matrix]
    PROJECTED,  # [M, D]
    SCRATCH, SCRATCH_BYTES,  # start of all threads' scratch memory, bytes per thread
    MAX_INPUTS,  # I of the widest matrix
    STEP_SIZE,
) = range(43)
