"""LlamaGen's transformers as plain functions of a state dict, written from their description: no cache, no module of ours.

A prefix (a class's vector, or a caption's 120 features through two matrices, padded on the left) and the tokens so far stand in
one causal sequence. Pairs of a head's numbers turn with a token's row (first half of the head) and column (second half); in the
prefix queries and keys are zero. The outputs from the prefix's last slot on are logits of the tokens.
"""

# Axes: B rows, P prefix slots, n tokens so far, S = P + n, D width, H heads, G key/value heads, d head width, F feature width

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """A tiny transformer. classes: with the null class; features (T, F) instead of them for text."""

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
    width, both = sizes.width, (sizes.heads + 2 * sizes.kv_heads) * (sizes.width // sizes.heads)
    found: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (sizes.codes, width), "output.weight": (sizes.codes, width),
                                         "norm.weight": (width,)}
    if sizes.features is None:
        found["cls_embedding.embedding_table.weight"] = (sizes.classes, width)
    else:
        found |= {"cls_embedding.cap_proj.fc1.weight": (width, sizes.features[1]),
                  "cls_embedding.cap_proj.fc2.weight": (width, width), "cls_embedding.uncond_embedding": sizes.features}
    for layer in range(sizes.layers):
        found |= {f"layers.{layer}.{name}": shape for name, shape in {
            "attention_norm.weight": (width,), "attention.wqkv.weight": (both, width), "attention.wo.weight": (width, width),
            "ffn_norm.weight": (width,), "feed_forward.w1.weight": (sizes.inner, width),
            "feed_forward.w3.weight": (sizes.inner, width), "feed_forward.w2.weight": (width, sizes.inner)}.items()}
    return found


def make_state(sizes: Sizes, seed: int = 0) -> dict[str, Tensor]:
    """Random weights. Embeddings of 0.02, as they are at first: the norms' epsilon is percents of their mean square."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(sizes).items():
        numbers = torch.randn(shape, generator=generator)
        if "norm" in name:
            state[name] = 1 + 0.2 * numbers
        elif "embed" in name and "uncond" not in name:
            state[name] = 0.02 * numbers
        else:
            state[name] = numbers * (0.02 if "cap_proj" in name else 0.05 if name.endswith(("wo.weight", "w2.weight"))
                                     else 0.25)
    return state


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(dim=-1, keepdim=True) / x.shape[-1] + 1e-5) * gain


def turned(heads: Tensor, sizes: Sizes, prefix: int) -> Tensor:
    """heads [B, S, H, d]: zero in the prefix, turned by row and column after it."""
    head = sizes.width // sizes.heads
    turned = torch.zeros_like(heads)
    for slot in range(prefix, heads.shape[1]):
        row, column = divmod(slot - prefix, sizes.side)
        for pair in range(head // 2):
            which, at = (row, pair) if pair < head // 4 else (column, pair - head // 4)
            angle = which / 10000.0 ** (2 * at / (head / 2))
            cosine, sine = math.cos(angle), math.sin(angle)
            left, right = heads[:, slot, :, 2 * pair], heads[:, slot, :, 2 * pair + 1]
            turned[:, slot, :, 2 * pair] = left * cosine - right * sine
            turned[:, slot, :, 2 * pair + 1] = left * sine + right * cosine
    return turned


def logits(state: dict[str, Tensor], sizes: Sizes, prefix: Tensor, real: Tensor, tokens: Tensor) -> Tensor:
    """prefix [B, P, D], real [B, P] bool, tokens [B, n] -> logits [B, n + 1, K] of the tokens 0 .. n."""
    hidden = torch.cat([prefix, state["tok_embeddings.weight"][tokens]], dim=1)
    rows, slots, width = hidden.shape
    head, group = width // sizes.heads, sizes.heads // sizes.kv_heads
    seen = torch.ones(slots, slots).tril().repeat(rows, 1, 1)
    seen[:, :, : real.shape[1]] *= real[:, None].float()
    seen[:, range(slots), range(slots)] = 1
    for layer in range(sizes.layers):
        def weight(name: str, layer: int = layer) -> Tensor:
            return state[f"layers.{layer}.{name}.weight"]

        both = rms(hidden, weight("attention_norm")) @ weight("attention.wqkv").T
        query, key, value = both.split([width, sizes.kv_heads * head, sizes.kv_heads * head], dim=-1)
        query, key, value = (part.reshape(rows, slots, -1, head) for part in (query, key, value))
        query, key = turned(query, sizes, real.shape[1]), turned(key, sizes, real.shape[1])
        outs = []
        for number in range(sizes.heads):
            scores = query[:, :, number] @ key[:, :, number // group].transpose(1, 2) / math.sqrt(head)
            outs.append(scores.masked_fill(seen == 0, float("-inf")).softmax(dim=-1) @ value[:, :, number // group])
        hidden = hidden + torch.cat(outs, dim=-1) @ weight("attention.wo").T
        normed = rms(hidden, weight("ffn_norm"))
        gate, value = normed @ weight("feed_forward.w1").T, normed @ weight("feed_forward.w3").T
        hidden = hidden + (gate / (1 + torch.exp(-gate)) * value) @ weight("feed_forward.w2").T
    return (rms(hidden, state["norm.weight"]) @ state["output.weight"].T)[:, real.shape[1] - 1:]


def class_prefix(state: dict[str, Tensor], labels: Tensor) -> Tensor:
    return state["cls_embedding.embedding_table.weight"][labels][:, None]


def text_prefix(state: dict[str, Tensor], features: Tensor) -> Tensor:
    inner = features @ state["cls_embedding.cap_proj.fc1.weight"].T
    inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    return inner @ state["cls_embedding.cap_proj.fc2.weight"].T


def greedy(state: dict[str, Tensor], sizes: Sizes, prefix: Tensor, null: Tensor, real: Tensor, scale: float) -> Tensor:
    """Whole pictures [B, N]: the likeliest token at each step, guided away from the null prefix under the same mask."""
    tokens = torch.zeros(len(prefix), 0, dtype=torch.int64)
    for _ in range(sizes.side**2):
        with_text, without = (logits(state, sizes, each, real, tokens)[:, -1] for each in (prefix, null))
        tokens = torch.cat([tokens, (without + (with_text - without) * scale).argmax(dim=-1, keepdim=True)], dim=1)
    return tokens
