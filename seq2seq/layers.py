"""Transformer layers from x-transformers (its only importer): a stack for text, a causal stack for image tokens.

x-transformers projects, rotates and adds up; which slot sees which is ours (`seq2seq/attention.py`), put in the place of its
own `Attend`.
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

LAYER_NORM_EPS = 1e-5


class PatternAttend(nn.Module):
    """Attention of one layer, in the place of x-transformers' Attend.

    blind_slots: queries and keys of the first so many slots are zero (LlamaGen's text), so that they are seen as a flat mean.
    """

    def __init__(self, pattern: Pattern, dropout: float, blind_slots: int = 0) -> None:
        super().__init__()
        self.pattern, self.dropout, self.blind_slots = pattern, dropout, blind_slots

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None,
                **unused: Any) -> tuple[Tensor, Intermediates]:
        """mask [B, 1, 1, P] bool: which prefix slots are real."""
        if self.blind_slots:
            query, key = blinded(query, self.blind_slots), blinded(key, self.blind_slots)
        key_mask = None if mask is None else mask[:, 0, 0]
        dropout = self.dropout if self.training else 0.0
        if query.device.type == "cuda" and self.pattern.name != "full" and not dropout:  # which flex attention does not have
            out = attend_flex(self.pattern, query, key, value, key_mask)
        else:
            out = attend(self.pattern, query, key, value, key_mask, dropout)
        return out, Intermediates()


def blinded(heads: Tensor, slots: int) -> Tensor:
    """heads [B, H, n, d] with the first `slots` slots set to zero."""
    return torch.cat([torch.zeros_like(heads[:, :, :slots]), heads[:, :, slots:]], dim=2)


def text_stack(config: LayersConfig, layers: int) -> nn.Module:
    """Bidirectional layers over a caption."""
    stack = Encoder(dim=config.width, depth=layers, heads=config.heads, **_layer_options(config))
    return _adjusted(stack, config)


def image_stack(config: TransformerConfig, layers: int, prefix: int, cross_attend: bool, blind_slots: int = 0) -> nn.Module:
    """Causal layers over `prefix` slots and then image slots, each layer with its own attention pattern."""
    stack = Decoder(dim=config.width, depth=layers, heads=config.heads, cross_attend=cross_attend, **_layer_options(config))
    blocks = layer_blocks(stack, cross_attend)
    for name, (attention, *_) in zip(config.patterns(layers), blocks, strict=True):
        pattern = Pattern(name, prefix, config.grid[1], config.convolution_size)
        attention.block.attend = PatternAttend(pattern, config.dropout, blind_slots)
    return _adjusted(stack, config)


def embedding_norm(config: LayersConfig) -> nn.LayerNorm | None:
    """The norm of embeddings, where the config has one; always with a bias."""
    return nn.LayerNorm(config.width, eps=config.norm_eps or LAYER_NORM_EPS) if config.embedding_norm else None


class _Recomputed:
    """Mixed into the classes of blocks: their activations can be computed again in the backward pass instead of kept.

    The call is what is repeated, and not `forward`, so that hooks which fetch weights (ZeRO-3) run again too.
    """

    recomputed = False

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        call = super().__call__  # type: ignore[misc]  # of the module that this is mixed into
        if self.recomputed and torch.is_grad_enabled():
            return checkpoint(call, *inputs, use_reentrant=False, **options)
        return call(*inputs, **options)


@lru_cache(maxsize=8)
def _recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Recomputed, kind), {})


def recompute_activations(model: nn.Module, on: bool) -> None:
    """Gradient checkpointing (Chen et al. 2016, https://arxiv.org/abs/1604.06174): keep the inputs of each block alone and
    compute its activations again in the backward pass; a third more time, the same numbers. For every stack in `model`."""
    for module in model.modules():
        if isinstance(module, _Recomputed):
            module.recomputed = on


class Block:
    """One block of a layer: `norm` before it, `block` itself, `norm_after` it (identity where there is none)."""

    def __init__(self, norms: Any, block: nn.Module) -> None:
        before, after, _ = norms
        self.norm = before if before is not None else nn.Identity()
        self.block: Any = block
        self.norm_after = after if after is not None else nn.Identity()


def layer_blocks(stack: Any, cross_attend: bool) -> list[tuple[Block, ...]]:
    """The blocks of each layer in order: self-attention, cross-attention (if any), feed-forward."""
    # x-transformers keeps one flat list of (norms, block, residual)
    blocks = [Block(norms, block) for norms, block, _ in stack.layers]
    step = 3 if cross_attend else 2
    return [tuple(blocks[i: i + step]) for i in range(0, len(blocks), step)]


def _layer_options(config: LayersConfig) -> dict[str, Any]:
    """The dozen of x-transformers' options that these models use, for encoder and decoder alike."""
    return {
        "use_rmsnorm": config.norm == "rmsnorm",
        "sandwich_norm": config.norm_placement != "pre",
        "attn_dim_head": config.head_dim,
        "attn_kv_heads": config.kv_heads,
        "attn_qk_rmsnorm": config.qk_norm,
        "attn_flash": True,  # scaled_dot_product_attention: the flash kernel where the device has one
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
    """What x-transformers has no option for."""
    for _, block, _ in stack.layers:  # type: ignore[union-attr]
        kind: Any = type(block)
        block.__class__ = _recomputed(kind)
    for module in stack.modules():
        if config.attention_bias and hasattr(module, "to_q"):
            for name in ("to_q", "to_k", "to_v", "to_out"):
                old: Any = getattr(module, name)
                new = nn.Linear(old.in_features, old.out_features)
                nn.init.zeros_(new.bias)
                setattr(module, name, new)
        if isinstance(module, FeedForward) and not config.feedforward_bias and config.feedforward != "gelu":
            module.ff[0].proj.register_parameter("bias", None)  # a GLU's projection keeps its bias under ff_no_bias
    if config.norm_placement == "normformer":
        for norms, block, _ in stack.layers:  # type: ignore[union-attr]
            if isinstance(block, FeedForward):
                norms[1] = None  # after attention only
    if config.plain_norms:
        _put_plain_norms(stack, config)
    return stack


def _put_plain_norms(stack: nn.Module, config: LayersConfig) -> None:
    """PyTorch's norms in the places of x-transformers', which have neither a choice of epsilon nor a bias. Theirs keep their
    gain less 1; these keep it as published checkpoints do."""
    for module in list(stack.modules()):
        for name, norm in list(module.named_children()):
            if isinstance(norm, RMSNorm):
                setattr(module, name, nn.RMSNorm(len(norm.g), eps=config.norm_eps))
            elif isinstance(norm, LayerNorm):
                eps = config.norm_eps or LAYER_NORM_EPS
                setattr(module, name, nn.LayerNorm(len(norm.gamma), eps=eps, bias=config.norm_bias))
