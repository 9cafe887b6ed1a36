"""Transformer layers from x-transformers (its only importer): a text stack, a causal image stack.

x-transformers projects, rotates and adds up. Attention itself, with its patterns, is ours
(`seq2seq/attention.py`) and replaces its `Attend`.
"""

# Axes: B batch, H heads, n slots, P prefix slots, D width, d head width

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from x_transformers import Decoder, Encoder
from x_transformers.attend import Intermediates
from x_transformers.x_transformers import FeedForward, LayerNorm, RMSNorm

from seq2seq.attention import Pattern, attend, attend_flex
from seq2seq.config import LayersConfig, TransformerConfig

LAYER_NORM_EPS = 1e-5  # x-transformers' and torch's default


class PatternAttend(nn.Module):
    """Attention of one layer, in the place of x-transformers' Attend.

    blind_slots: the first slots, whose queries and keys are set to zero (LlamaGen's text), so that
    later slots see them as a flat mean.
    """

    def __init__(self, pattern: Pattern, dropout: float, blind_slots: int = 0) -> None:
        super().__init__()
        self.pattern, self.dropout, self.blind_slots = pattern, dropout, blind_slots

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None,
                **unused: Any) -> tuple[Tensor, Intermediates]:
        """query, key, value [B, H, n, d]; mask [B, 1, 1, P] bool, True = real prefix slot.

        unused: x-transformers' arguments for features that these models do not have.
        """
        if self.blind_slots:
            query, key = blinded(query, self.blind_slots), blinded(key, self.blind_slots)
        key_mask = None if mask is None else mask[:, 0, 0]  # [B, P]
        dropout = self.dropout if self.training else 0.0

        # flex attention has no dropout; for full attention the causal kernel skips as much
        sparse = self.pattern.name != "full"
        if query.device.type == "cuda" and sparse and not dropout:
            out = attend_flex(self.pattern, query, key, value, key_mask)
        else:
            out = attend(self.pattern, query, key, value, key_mask, dropout)
        return out, Intermediates()  # x-transformers expects one, to put its cache into


def blinded(heads: Tensor, slots: int) -> Tensor:
    """heads [B, H, n, d] with the first `slots` slots set to zero."""
    # not in place: autograd may have kept the heads for the backward pass
    return torch.cat([torch.zeros_like(heads[:, :, :slots]), heads[:, :, slots:]], dim=2)


def text_stack(config: LayersConfig, layers: int) -> nn.Module:
    """Build bidirectional layers over a caption."""
    stack = Encoder(dim=config.width, depth=layers, heads=config.heads, **_layer_options(config))
    return _adjusted(stack, config)


def image_stack(config: TransformerConfig, layers: int, prefix: int, cross_attend: bool,
                blind_slots: int = 0) -> nn.Module:
    """Build causal layers over `prefix` slots and the image slots, each with its own pattern."""
    stack = Decoder(dim=config.width, depth=layers, heads=config.heads, cross_attend=cross_attend,
                    **_layer_options(config))
    blocks = layer_blocks(stack, cross_attend)
    for name, (attention, *_) in zip(config.patterns(layers), blocks, strict=True):
        pattern = Pattern(name, prefix, config.grid[1], config.convolution_size)
        attention.block.attend = PatternAttend(pattern, config.dropout, blind_slots)
    return _adjusted(stack, config)


def embedding_norm(config: LayersConfig) -> nn.LayerNorm | None:
    """Build the norm of embeddings if the config has one; always with a bias."""
    if not config.embedding_norm:
        return None
    return nn.LayerNorm(config.width, eps=config.norm_eps or LAYER_NORM_EPS)


# ---- gradient checkpointing

class _Recomputed:
    """Mixin for classes of blocks: recompute activations in the backward pass, do not keep them.

    It wraps `__call__` and not `forward`, so that hooks which fetch weights (ZeRO-3) run again too.
    """

    recomputed = False

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        call = super().__call__  # type: ignore[misc]  # of the module that this is mixed into
        if self.recomputed and torch.is_grad_enabled():
            return checkpoint(call, *inputs, use_reentrant=False, **options)
        return call(*inputs, **options)


# one class per kind of block, with its name, so that a printed model reads as before
@lru_cache(maxsize=8)
def _recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Recomputed, kind), {})


def recompute_activations(model: nn.Module, on: bool) -> None:
    """Switch gradient checkpointing (Chen et al. 2016, https://arxiv.org/abs/1604.06174) on or off.

    On, every stack in `model` keeps only the inputs of each block and computes its activations
    again in the backward pass: a third more time, the same numbers.
    """
    for module in model.modules():
        if isinstance(module, _Recomputed):
            module.recomputed = on


# ---- x-transformers' layers

class Block:
    """One block of a layer: `norm`, `block`, `norm_after`; a missing norm is an identity."""

    def __init__(self, norms: Any, block: nn.Module) -> None:
        before, after, _ = norms
        self.norm = before if before is not None else nn.Identity()
        self.block: Any = block
        self.norm_after = after if after is not None else nn.Identity()


def layer_blocks(stack: Any, cross_attend: bool) -> list[tuple[Block, ...]]:
    """Return each layer's blocks: self-attention, cross-attention (if any), feed-forward."""
    # x-transformers keeps one flat list of (norms, block, residual)
    blocks = [Block(norms, block) for norms, block, _ in stack.layers]
    step = 3 if cross_attend else 2
    return [tuple(blocks[i: i + step]) for i in range(0, len(blocks), step)]


def _layer_options(config: LayersConfig) -> dict[str, Any]:
    """Options of x-transformers' encoder and decoder alike."""
    return {
        "use_rmsnorm": config.norm == "rmsnorm",
        "sandwich_norm": config.norm_placement != "pre",  # `_adjusted` makes normformer of it
        "attn_dim_head": config.head_dim,
        "attn_kv_heads": config.kv_heads,  # None: as many as heads
        "attn_qk_rmsnorm": config.qk_norm,
        "attn_flash": True,  # scaled_dot_product_attention
        "attn_project_out": True,  # also with one head, so that every size has the same parameters
        "attn_dropout": config.dropout,
        "ff_glu": config.feedforward != "gelu",
        "ff_swish": config.feedforward == "swiglu",
        "ff_mult": config.feedforward_multiplier,
        "ff_post_act_ln": config.norm_placement == "normformer",
        "ff_no_bias": not config.feedforward_bias,
        "ff_dropout": config.dropout,
        "verbose": False,
    }


def _adjusted(stack: nn.Module, config: LayersConfig) -> nn.Module:
    """Apply the parts of the config that x-transformers has no option for."""
    # the class is swapped, not the block wrapped: names of parameters stay
    for _, block, _ in stack.layers:  # type: ignore[union-attr]
        kind: Any = type(block)
        block.__class__ = _recomputed(kind)

    glu = config.feedforward != "gelu"
    for module in stack.modules():
        if config.attention_bias and hasattr(module, "to_q"):
            _add_projection_biases(module)
        if isinstance(module, FeedForward) and glu and not config.feedforward_bias:
            # x-transformers' ff_no_bias does not reach the projection of a GLU
            module.ff[0].proj.register_parameter("bias", None)

    if config.norm_placement == "normformer":
        for norms, block, _ in stack.layers:  # type: ignore[union-attr]
            if isinstance(block, FeedForward):
                norms[1] = None  # put there by sandwich_norm; normformer's is after attention only
    if config.plain_norms:
        _put_plain_norms(stack, config)
    return stack


def _add_projection_biases(attention: nn.Module) -> None:
    # x-transformers has no biases here; GPT-2's begin at zero
    for name in ("to_q", "to_k", "to_v", "to_out"):
        old: Any = getattr(attention, name)
        new = nn.Linear(old.in_features, old.out_features)
        nn.init.zeros_(new.bias)
        setattr(attention, name, new)


def _put_plain_norms(stack: nn.Module, config: LayersConfig) -> None:
    """Replace x-transformers' norms, which have no choice of epsilon and no bias, by PyTorch's.

    x-transformers stores the gain less 1; PyTorch's store the gain, as published checkpoints do.
    """
    eps = config.norm_eps
    # lists: the loops replace what they go over
    for module in list(stack.modules()):
        for name, norm in list(module.named_children()):
            if isinstance(norm, RMSNorm):
                setattr(module, name, nn.RMSNorm(len(norm.g), eps=eps))
            elif isinstance(norm, LayerNorm):
                plain = nn.LayerNorm(len(norm.gamma), eps=eps or LAYER_NORM_EPS,
                                     bias=config.norm_bias)
                setattr(module, name, plain)
