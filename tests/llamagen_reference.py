"""LlamaGen's transformers as plain functions of a state dict: no cache, no module of ours.

A prefix (a class's vector, or a caption's 120 features through two matrices, padded on the left)
and the tokens so far form one causal sequence. Rotary positions rotate pairs of a head by the
token's row (first half of the head) and column (second half); queries and keys of the prefix are
zero. The outputs from the prefix's last slot on are the logits of the tokens.
"""

# Axes: B rows, P prefix slots, n tokens so far, S = P + n, K codes, D width, H heads, d head width

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """A tiny transformer. classes: the null class included; features (T, F): for text instead."""

    width: int = 32
    heads: int = 2
    kv_heads: int = 2
    layers: int = 2
    inner: int = 96
    codes: int = 32
    side: int = 4
    classes: int = 11
    features: tuple[int, int] | None = None


TEXT = Sizes(layers=3, features=(6, 24))


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Every tensor of a published file by its name."""
    width = sizes.width
    qkv_rows = (sizes.heads + 2 * sizes.kv_heads) * (width // sizes.heads)
    found: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (sizes.codes, width), "output.weight": (sizes.codes, width),
        "norm.weight": (width,)}
    if sizes.features is None:
        found["cls_embedding.embedding_table.weight"] = (sizes.classes, width)
    else:
        found["cls_embedding.cap_proj.fc1.weight"] = (width, sizes.features[1])
        found["cls_embedding.cap_proj.fc2.weight"] = (width, width)
        found["cls_embedding.uncond_embedding"] = sizes.features

    layer_shapes = {
        "attention_norm.weight": (width,), "attention.wqkv.weight": (qkv_rows, width),
        "attention.wo.weight": (width, width), "ffn_norm.weight": (width,),
        "feed_forward.w1.weight": (sizes.inner, width),
        "feed_forward.w3.weight": (sizes.inner, width),
        "feed_forward.w2.weight": (width, sizes.inner)}
    for layer in range(sizes.layers):
        found |= {f"layers.{layer}.{name}": shape for name, shape in layer_shapes.items()}
    return found


def make_state(sizes: Sizes, seed: int = 0) -> dict[str, Tensor]:
    """Random weights, embeddings of 0.02 as initialised: norms then depend on their epsilon."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(sizes).items():
        numbers = torch.randn(shape, generator=generator)
        if "norm" in name:
            state[name] = 1 + 0.2 * numbers
        elif "cap_proj" in name or ("embed" in name and "uncond" not in name):
            state[name] = 0.02 * numbers
        elif name.endswith(("wo.weight", "w2.weight")):
            state[name] = 0.05 * numbers
        else:
            state[name] = 0.25 * numbers
    return state


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(dim=-1, keepdim=True) / x.shape[-1] + 1e-5) * gain


def rotated(heads: Tensor, sizes: Sizes, prefix: int) -> Tensor:
    """heads [B, S, H, d]: zero in the prefix, rotated by row and column after it."""
    head = sizes.width // sizes.heads
    rotated = torch.zeros_like(heads)
    for slot in range(prefix, heads.shape[1]):
        row, column = divmod(slot - prefix, sizes.side)
        for pair in range(head // 2):
            position, number = (row, pair) if pair < head // 4 else (column, pair - head // 4)
            angle = position / 10000.0 ** (2 * number / (head / 2))
            cosine, sine = math.cos(angle), math.sin(angle)
            left, right = heads[:, slot, :, 2 * pair], heads[:, slot, :, 2 * pair + 1]
            rotated[:, slot, :, 2 * pair] = left * cosine - right * sine
            rotated[:, slot, :, 2 * pair + 1] = left * sine + right * cosine
    return rotated


def logits(state: dict[str, Tensor], sizes: Sizes, prefix: Tensor, real: Tensor, tokens: Tensor
           ) -> Tensor:
    """prefix [B, P, D], real [B, P] bool, tokens [B, n] -> logits [B, n + 1, K] of 0 .. n."""
    hidden = torch.cat([prefix, state["tok_embeddings.weight"][tokens]], dim=1)  # [B, S, D]
    rows, slots, width = hidden.shape
    head = width // sizes.heads
    group = sizes.heads // sizes.kv_heads  # query heads per key/value head

    seen = torch.ones(slots, slots).tril().repeat(rows, 1, 1)  # [B, queries, keys]
    seen[:, :, : real.shape[1]] *= real[:, None].float()
    seen[:, range(slots), range(slots)] = 1  # a padded slot sees itself, else its softmax is nan
    for layer in range(sizes.layers):
        def weight(name: str, layer: int = layer) -> Tensor:
            return state[f"layers.{layer}.{name}.weight"]

        qkv = rms(hidden, weight("attention_norm")) @ weight("attention.wqkv").T
        parts = qkv.split([width, sizes.kv_heads * head, sizes.kv_heads * head], dim=-1)
        query, key, value = (part.reshape(rows, slots, -1, head) for part in parts)
        query = rotated(query, sizes, real.shape[1])
        key = rotated(key, sizes, real.shape[1])
        outs = []
        for number in range(sizes.heads):
            kv = number // group
            scores = query[:, :, number] @ key[:, :, kv].transpose(1, 2) / math.sqrt(head)
            weights = scores.masked_fill(seen == 0, float("-inf")).softmax(dim=-1)
            outs.append(weights @ value[:, :, kv])
        hidden = hidden + torch.cat(outs, dim=-1) @ weight("attention.wo").T

        normed = rms(hidden, weight("ffn_norm"))
        gate = normed @ weight("feed_forward.w1").T
        value = normed @ weight("feed_forward.w3").T
        silu = gate / (1 + torch.exp(-gate))
        hidden = hidden + (silu * value) @ weight("feed_forward.w2").T

    outputs = rms(hidden, state["norm.weight"]) @ state["output.weight"].T
    return outputs[:, real.shape[1] - 1:]


def class_prefix(state: dict[str, Tensor], labels: Tensor) -> Tensor:
    return state["cls_embedding.embedding_table.weight"][labels][:, None]


def text_prefix(state: dict[str, Tensor], features: Tensor) -> Tensor:
    inner = features @ state["cls_embedding.cap_proj.fc1.weight"].T
    inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    return inner @ state["cls_embedding.cap_proj.fc2.weight"].T


def greedy(state: dict[str, Tensor], sizes: Sizes, prefix: Tensor, null: Tensor, real: Tensor,
           scale: float) -> Tensor:
    """All tokens of images [B, N], greedily under guidance; the null prefix has the same mask."""
    tokens = torch.zeros(len(prefix), 0, dtype=torch.int64)
    for _ in range(sizes.side**2):
        conditional = logits(state, sizes, prefix, real, tokens)[:, -1]
        unconditional = logits(state, sizes, null, real, tokens)[:, -1]
        guided = unconditional + (conditional - unconditional) * scale
        tokens = torch.cat([tokens, guided.argmax(dim=-1, keepdim=True)], dim=1)
    return tokens
