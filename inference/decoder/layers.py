"""The layers of the lean decoder: what x-transformers computes in eval mode, from fused weights, on flat rows.

A layer is self-attention, cross-attention (where the model has it), feed-forward; each reads the normed stream and adds to it.
"""

# Axes: M rows of the stream (R rows x s slots), R rows, s slots at once, H heads, G key/value heads, D width, d head width,
#       C captions, n pictures a caption, T text slots, e slots that a step can see

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inference.decoder.kv_cache import CaptionMemory
from inference.decoder.projection import Plan, Projection, project
from inference.decoder.slots import RowSlots, SharedSlots
from seq2seq.layers import LAYER_NORM_EPS, Block

Slots = SharedSlots | RowSlots


class Norm:
    """RMS or layer norm [.., D], x-transformers' or PyTorch's, with few kernels.

    epsilon: what is added under the root; of x-transformers' RMS norm it is 0, as it divides by the length, at least 1e-12.
    """

    def __init__(self, norm: Any) -> None:
        self.bias: Tensor | None = None
        if isinstance(norm, nn.RMSNorm | nn.LayerNorm):
            assert norm.eps is not None
            self.rms, self.epsilon, self.gain = isinstance(norm, nn.RMSNorm), norm.eps, norm.weight.detach()
            if isinstance(norm, nn.LayerNorm) and norm.bias is not None:
                self.bias = norm.bias.detach()
        else:
            self.rms = hasattr(norm, "g")
            self.epsilon = 0.0 if self.rms else LAYER_NORM_EPS
            self.gain = (norm.g if self.rms else norm.gamma).detach() + float(norm.unit_offset)
        self.shape = tuple(self.gain.shape)
        self.by_hand = self.gain.device.type == "cpu"  # on the CPU torch's own rms_norm is slower than two kernels
        if self.rms and self.by_hand:
            self.scaled = self.gain * len(self.gain) ** 0.5

    def __call__(self, x: Tensor) -> Tensor:
        if not self.rms:
            return F.layer_norm(x, self.shape, self.gain, self.bias, self.epsilon)
        if not self.by_hand:
            return F.rms_norm(x, self.shape, self.gain, self.epsilon or 1e-24)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        if self.epsilon:  # the root of the mean square plus epsilon, times the root of the width, which `scaled` has too
            length = length.square_().add_(self.epsilon * len(self.gain)).sqrt_()
        return x.div(length.clamp_min_(1e-12)).mul_(self.scaled)


class HeadNorm:
    """RMS norm of each head [M, heads, d], with a gain a head."""

    def __init__(self, *norms: Any) -> None:
        gains = torch.cat([norm.gamma.detach() + 1 for norm in norms])[:, 0]  # [heads, d]
        self.scaled = gains * gains.shape[-1] ** 0.5

    def __call__(self, heads: Tensor) -> Tensor:
        return heads.div(torch.linalg.vector_norm(heads, dim=-1, keepdim=True).clamp_min_(1e-12)).mul_(self.scaled)


def turned(heads: Tensor, turns: Tensor) -> Tensor:
    """Rotary: pairs (0,1), (2,3), ... of heads [M, heads, d] as complex numbers times turns [M or 1, 1, d/2]."""
    pairs = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(heads.dtype)


class _Sublayer:
    """Norm before; the projection at the end; norm after where there is one."""

    def __init__(self, block: Block) -> None:
        self.norm = Norm(block.norm) if not isinstance(block.norm, nn.Identity) else None
        self.norm_after = Norm(block.norm_after) if not isinstance(block.norm_after, nn.Identity) else None
        self.out: Projection

    def normed(self, hidden: Tensor) -> Tensor:
        return hidden if self.norm is None else self.norm(hidden)

    def added(self, hidden: Tensor, inner: Tensor) -> Tensor:
        return self.out.add_to(hidden, inner) if self.norm_after is None else hidden + self.norm_after(self.out(inner))


class SelfAttention(_Sublayer):
    """Attention of image slots (and a decoder-only model's text) to the slots before them."""

    def __init__(self, block: Block, heads: int, kv_heads: int, head_dim: int, plan: Plan) -> None:
        super().__init__(block)
        attention = block.block
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.pattern, self.blind_slots = attention.attend.pattern, attention.attend.blind_slots
        self.qkv = project(attention, ("to_q", "to_k", "to_v"), plan)
        self.out = project(attention, ("to_out",), plan)
        self.head_norm = None if attention.q_rmsnorm is None else HeadNorm(attention.q_rmsnorm, attention.k_rmsnorm)

    def __call__(self, hidden: Tensor, layer: int, slots: Slots) -> Tensor:
        rows = slots.cache.row_count
        heads = self.qkv(self.normed(hidden)).unflatten(-1, (-1, self.head_dim))  # [M, H + 2G, d]
        turning, value = heads[:, : self.heads + self.kv_heads], heads[:, self.heads + self.kv_heads:]
        if self.head_norm is not None:
            turning = self.head_norm(turning)
        if slots.turns is not None:
            turning = turned(turning, slots.turns)
        turning, value = _by_head(turning, rows), _by_head(value, rows)  # [R, heads, s, d]
        if isinstance(slots, SharedSlots) and slots.first < self.blind_slots:
            turning = turning.clone()
            turning[:, :, : self.blind_slots - slots.first] = 0
        query, key = turning[:, : self.heads], turning[:, self.heads:]
        keys, values = slots.write(layer, key, value)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=slots.mask(self.pattern),
                                             enable_gqa=self.heads != self.kv_heads)
        return self.added(hidden, out.transpose(1, 2).reshape(len(hidden), -1))


def _by_head(heads: Tensor, rows: int) -> Tensor:
    """[R * s, heads, d] -> [R, heads, s, d]."""
    return heads.unsqueeze(2) if len(heads) == rows else heads.unflatten(0, (rows, -1)).transpose(1, 2)


class CrossAttention(_Sublayer):
    """Attention of each row to its caption."""

    def __init__(self, block: Block, heads: int, kv_heads: int, head_dim: int, plan: Plan) -> None:
        super().__init__(block)
        attention = block.block
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.query = project(attention, ("to_q",), plan)
        self.key_value = project(attention, ("to_k", "to_v"), plan)
        self.out = project(attention, ("to_out",), plan)
        normed = attention.q_rmsnorm is not None
        self.query_norm = HeadNorm(attention.q_rmsnorm) if normed else None
        self.key_norm = HeadNorm(attention.k_rmsnorm) if normed else None

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """memory [C, T, D] -> keys and values [C, G, T, d], once a caption."""
        both = self.key_value(memory.flatten(0, 1)).unflatten(-1, (-1, self.head_dim))  # [C * T, 2G, d]
        key, value = both[:, : self.kv_heads], both[:, self.kv_heads:]
        if self.key_norm is not None:
            key = self.key_norm(key)
        shape = memory.shape[:2]
        keys, values = (part.unflatten(0, shape).transpose(1, 2).contiguous() for part in (key, value))
        return keys, values

    def __call__(self, hidden: Tensor, layer: int, groups: list[CaptionMemory], masks: list[Tensor | None]) -> Tensor:
        """masks: what is added to each group's scores [C, 1, 1, T]; None where all of its text is real."""
        query = self.query(self.normed(hidden)).unflatten(-1, (-1, self.head_dim))  # [M, H, d]
        if self.query_norm is not None:
            query = self.query_norm(query)
        slots = len(query) // sum(group.rows for group in groups)
        outs, start = [], 0
        for group, mask in zip(groups, masks, strict=True):
            # the n rows of a caption (and their slots) become queries over the caption's one set of keys
            end = start + group.rows * slots
            part = query[start:end].unflatten(0, (group.captions, -1)).transpose(1, 2)  # [C, H, n * s, d]
            out = F.scaled_dot_product_attention(
                part, group.keys[layer], group.values[layer], attn_mask=mask, enable_gqa=self.heads != self.kv_heads)
            outs.append(out.transpose(1, 2).reshape(end - start, -1))
            start = end
        return self.added(hidden, outs[0] if len(outs) == 1 else torch.cat(outs))


class FeedForward(_Sublayer):
    """Gated or plain."""

    def __init__(self, block: Block, plan: Plan) -> None:
        super().__init__(block)
        parts = [part for part in block.block.ff if not isinstance(part, nn.Dropout)]
        self.gated = hasattr(parts[0], "proj")
        self.activation = parts[0].act if self.gated else parts[0][-1]
        self.up = project(parts[0], ("proj",) if self.gated else ("0",), plan)
        self.inner_norm = Norm(parts[1]) if len(parts) == 3 else None
        at = next(name for name, part in block.block.ff.named_children() if part is parts[-1])
        self.out = project(block.block.ff, (at,), plan)

    def __call__(self, hidden: Tensor) -> Tensor:
        inner = self.up(self.normed(hidden))  # [M, inner (twice)]
        if self.gated:
            up, gate = inner.chunk(2, dim=-1)
            inner = self.activation(gate).mul_(up)
        else:
            inner = self.activation(inner)
        if self.inner_norm is not None:
            inner = self.inner_norm(inner)
        return self.added(hidden, inner)
