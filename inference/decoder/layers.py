"""Layers of the serving decoder: x-transformers' in eval mode, from fused weights, on flat rows.

A layer is self-attention, cross-attention (in encoder-decoders), feed-forward; each normalizes the
stream and adds to it.
"""

# Axes: M rows of the stream (R rows x s slots), R rows, s slots per row in this step, H heads,
#       G key/value heads, D width, d head width, C captions, n images per caption, T text slots,
#       e slots that a step can see

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.decoder.kv_cache import CaptionMemory
from inference.decoder.projection import Projection, WeightStorage, fuse_linears
from inference.decoder.slots import RowSlots, SharedSlots
from seq2seq.layers import LAYER_NORM_EPS, Block, layer_blocks

Slots = SharedSlots | RowSlots


class AttentionShape(NamedTuple):
    """Head counts and width that every attention layer of a decoder shares."""

    heads: int
    kv_heads: int
    head_dim: int


class Norm:
    """RMS or layer norm [.., D] of x-transformers or PyTorch, in few kernels.

    epsilon: added under the root. 0 for x-transformers' RMS norm, which divides by the vector's
        length, at least 1e-12.
    """

    def __init__(self, norm: Any) -> None:
        self.bias: Tensor | None = None
        if isinstance(norm, nn.RMSNorm | nn.LayerNorm):
            assert norm.eps is not None
            self.rms = isinstance(norm, nn.RMSNorm)
            self.epsilon = norm.eps
            self.gain = norm.weight.detach()
            if isinstance(norm, nn.LayerNorm) and norm.bias is not None:
                self.bias = norm.bias.detach()
        else:
            # x-transformers names RMSNorm's gain `g` and LayerNorm's `gamma`; both may be stored
            # less 1
            self.rms = hasattr(norm, "g")
            self.epsilon = 0.0 if self.rms else LAYER_NORM_EPS
            gain = norm.g if self.rms else norm.gamma
            self.gain = gain.detach() + float(norm.unit_offset)
        self.shape = tuple(self.gain.shape)
        self.by_hand = self.gain.device.type == "cpu"  # torch's rms_norm is slower there
        if self.rms and self.by_hand:
            self.scaled_gain = self.gain * len(self.gain) ** 0.5

    def __call__(self, x: Tensor) -> Tensor:
        if not self.rms:
            return F.layer_norm(x, self.shape, self.gain, self.bias, self.epsilon)
        if not self.by_hand:
            return F.rms_norm(x, self.shape, self.gain, self.epsilon or 1e-24)

        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        if self.epsilon:
            # sqrt(mean(x^2) + epsilon) times sqrt(D), the factor that `scaled_gain` has too
            length = length.square_().add_(self.epsilon * len(self.gain)).sqrt_()
        return x.div(length.clamp_min_(1e-12)).mul_(self.scaled_gain)


class HeadNorm:
    """RMS norm of each head [M, heads, d] with one gain per head: QK norm."""

    def __init__(self, *norms: Any) -> None:
        gains = torch.cat([norm.gamma.detach() + 1 for norm in norms])[:, 0]  # [heads, d]
        self.scaled_gain = gains * gains.shape[-1] ** 0.5

    def __call__(self, heads: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(heads, dim=-1, keepdim=True).clamp_min_(1e-12)
        return heads.div(length).mul_(self.scaled_gain)


def rotate(heads: Tensor, rotations: Tensor) -> Tensor:
    """Rotate pairs (0, 1), (2, 3), ... of heads [M, heads, d] by factors [M or 1, 1, d/2]."""
    pairs = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations).flatten(-2).to(heads.dtype)


class _Sublayer:
    """Norm before, output projection, norm after where the model has one, residual."""

    def __init__(self, block: Block) -> None:
        self.norm = _norm_or_none(block.norm)
        self.norm_after = _norm_or_none(block.norm_after)
        self.out: Projection

    def normed(self, hidden: Tensor) -> Tensor:
        return hidden if self.norm is None else self.norm(hidden)

    def add_projected(self, hidden: Tensor, inner: Tensor) -> Tensor:
        """hidden + out(inner); without a norm after, the projection adds in the same kernel."""
        if self.norm_after is None:
            return self.out.add_to(hidden, inner)
        return hidden + self.norm_after(self.out(inner))


def _norm_or_none(norm: nn.Module) -> Norm | None:
    return None if isinstance(norm, nn.Identity) else Norm(norm)


class SelfAttention(_Sublayer):
    """Attention of image slots (and a decoder-only model's text) to the slots before them."""

    def __init__(self, block: Block, shape: AttentionShape, storage: WeightStorage) -> None:
        super().__init__(block)
        attention = block.block
        self.heads, self.kv_heads, self.head_dim = shape
        self.pattern = attention.attend.pattern
        self.blind_slots = attention.attend.blind_slots
        self.qkv = fuse_linears(attention, ("to_q", "to_k", "to_v"), storage)
        self.out = fuse_linears(attention, ("to_out",), storage)
        self.head_norm: HeadNorm | None = None
        if attention.q_rmsnorm is not None:
            self.head_norm = HeadNorm(attention.q_rmsnorm, attention.k_rmsnorm)

    def __call__(self, hidden: Tensor, layer: int, slots: Slots) -> Tensor:
        heads = self.qkv(self.normed(hidden)).unflatten(-1, (-1, self.head_dim))  # [M, H + 2G, d]
        query_key, value = heads.tensor_split([self.heads + self.kv_heads], dim=1)

        # queries and keys stay one tensor: one kernel for both
        if self.head_norm is not None:
            query_key = self.head_norm(query_key)
        if slots.rotations is not None:
            query_key = rotate(query_key, slots.rotations)

        rows = slots.cache.row_count
        query_key, value = _by_head(query_key, rows), _by_head(value, rows)  # [R, heads, s, d]
        if isinstance(slots, SharedSlots) and slots.first < self.blind_slots:
            query_key = query_key.clone()
            query_key[:, :, : self.blind_slots - slots.first] = 0

        query, key = query_key[:, : self.heads], query_key[:, self.heads:]
        keys, values = slots.write(layer, key, value)
        out = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=slots.mask(self.pattern),
            enable_gqa=self.heads != self.kv_heads)
        return self.add_projected(hidden, out.transpose(1, 2).reshape(len(hidden), -1))


def _by_head(heads: Tensor, rows: int) -> Tensor:
    """[R * s, heads, d] -> [R, heads, s, d]."""
    if len(heads) == rows:
        return heads.unsqueeze(2)
    return heads.unflatten(0, (rows, -1)).transpose(1, 2)


class CrossAttention(_Sublayer):
    """Attention of each row to its caption."""

    def __init__(self, block: Block, shape: AttentionShape, storage: WeightStorage) -> None:
        super().__init__(block)
        attention = block.block
        self.heads, self.kv_heads, self.head_dim = shape
        self.query = fuse_linears(attention, ("to_q",), storage)
        self.key_value = fuse_linears(attention, ("to_k", "to_v"), storage)
        self.out = fuse_linears(attention, ("to_out",), storage)
        self.query_norm: HeadNorm | None = None
        self.key_norm: HeadNorm | None = None
        if attention.q_rmsnorm is not None:
            self.query_norm = HeadNorm(attention.q_rmsnorm)
            self.key_norm = HeadNorm(attention.k_rmsnorm)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """memory [C, T, D] -> keys and values [C, G, T, d], computed once per caption."""
        key_value = self.key_value(memory.flatten(0, 1))
        key, value = key_value.unflatten(-1, (-1, self.head_dim)).chunk(2, dim=1)  # [C * T, G, d]
        if self.key_norm is not None:
            key = self.key_norm(key)

        shape = memory.shape[:2]
        keys = key.unflatten(0, shape).transpose(1, 2).contiguous()
        values = value.unflatten(0, shape).transpose(1, 2).contiguous()
        return keys, values

    def __call__(self, hidden: Tensor, layer: int, groups: list[CaptionMemory],
                 masks: list[Tensor | None]) -> Tensor:
        """masks: additive mask [C, 1, 1, T] of each group; None where all of its text is real."""
        query = self.query(self.normed(hidden)).unflatten(-1, (-1, self.head_dim))  # [M, H, d]
        if self.query_norm is not None:
            query = self.query_norm(query)

        slots_per_row = len(query) // sum(group.rows for group in groups)
        outs = []
        start = 0
        for group, mask in zip(groups, masks, strict=True):
            # the n rows of a caption (and their slots) become queries over the caption's one set of
            # keys
            end = start + group.rows * slots_per_row
            part = query[start:end].unflatten(0, (group.captions, -1))  # [C, n * s, H, d]
            out = F.scaled_dot_product_attention(
                part.transpose(1, 2), group.keys[layer], group.values[layer], attn_mask=mask,
                enable_gqa=self.heads != self.kv_heads)
            outs.append(out.transpose(1, 2).reshape(end - start, -1))
            start = end
        return self.add_projected(hidden, outs[0] if len(outs) == 1 else torch.cat(outs))


class FeedForward(_Sublayer):
    """Feed-forward block, gated or plain."""

    def __init__(self, block: Block, storage: WeightStorage) -> None:
        super().__init__(block)
        ff = block.block.ff
        names = [name for name, part in ff.named_children() if not isinstance(part, nn.Dropout)]
        first, *inner, _ = (getattr(ff, name) for name in names)
        self.gated = hasattr(first, "proj")
        if self.gated:
            self.activation = first.act
            self.up = fuse_linears(first, ("proj",), storage)
        else:
            self.activation = first[-1]
            self.up = fuse_linears(first, ("0",), storage)
        self.inner_norm = Norm(inner[0]) if inner else None
        self.out = fuse_linears(ff, (names[-1],), storage)

    def __call__(self, hidden: Tensor) -> Tensor:
        inner = self.up(self.normed(hidden))  # [M, I], or [M, 2 I] if gated
        if self.gated:
            value, gate = inner.chunk(2, dim=-1)
            inner = self.activation(gate).mul_(value)
        else:
            inner = self.activation(inner)
        if self.inner_norm is not None:
            inner = self.inner_norm(inner)
        return self.add_projected(hidden, inner)


class Layer(NamedTuple):
    """One decoder layer; without cross-attention in decoder-only models."""

    self_attention: SelfAttention
    cross_attention: CrossAttention | None
    feedforward: FeedForward


def fuse_layers(decoder: nn.Module, crosses: bool, shape: AttentionShape,
                storage: WeightStorage) -> list[Layer]:
    """Take over the layers of a decoder stack. crosses: whether they have cross-attention."""
    layers = []
    for blocks in layer_blocks(decoder, cross_attend=crosses):
        cross = CrossAttention(blocks[1], shape, storage) if crosses else None
        attention = SelfAttention(blocks[0], shape, storage)
        layers.append(Layer(attention, cross, FeedForward(blocks[-1], storage)))
    return layers
