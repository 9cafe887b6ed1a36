"""The serving graph: the trained parameters of EncoderDecoder, read into a plain decoder with a KV cache.

x-transformers stays the training graph; a parity test on logits holds the two together. `prefill` projects each caption's
keys and values once, `decode_one` computes one step for all rows.
"""

# Axes: B rows, C captions, n images a caption, H heads, G key/value heads, N image tokens, T text ids, D width, d head width

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.kv_cache import CaptionMemory, SelfCache
from seq2seq import EncoderDecoder, TextBatch
from seq2seq.positions import apply_rotary


class CachedDecoder:
    """Reads an EncoderDecoder in eval mode; holds no weights of its own."""

    def __init__(self, model: EncoderDecoder) -> None:
        self.model = model
        self.config = model.config
        blocks = list(model.decoder.layers)
        # x-transformers lays a decoder out as self-attention, cross-attention, feed-forward, again and again;
        # each entry is (norms, block, residual), the first norm the one before the block
        self.blocks: list[tuple] = [tuple((norms[0], block) for norms, block, _ in blocks[i: i + 3])
                                    for i in range(0, len(blocks), 3)]

    @torch.inference_mode()
    def prefill(self, text: TextBatch, images: int) -> CaptionMemory:
        """Encode C captions once, for `images` rows each."""
        memory = self.model.encode_text(text.text_ids, text.text_mask)  # [C, T, D]
        keys, values = [], []
        for _, (_, cross), _ in self.blocks:
            key, value = cross.split_k_heads(cross.to_k(memory)), cross.split_v_heads(cross.to_v(memory))  # [C, G, T, d]
            keys.append(key if cross.k_rmsnorm is None else cross.k_rmsnorm(key))
            values.append(value)
        return CaptionMemory(keys, values, text.text_mask[:, None, None, :], len(text.text_ids), images)

    def new_cache(self, rows: int) -> SelfCache:
        """An empty self-attention cache for `rows` pictures."""
        config = self.config
        return SelfCache(config.decoder_layers, rows, config.kv_heads or config.heads, config.num_tokens, config.head_dim,
                         like=self.model.to_logits.weight)

    @torch.inference_mode()
    def decode_one(self, previous: Tensor | None, position: int, groups: list[CaptionMemory], cache: SelfCache) -> Tensor:
        """Logits [B, K] of token `position`, from the tokens before it [B] (None at position 0).

        The rows are those of the groups, one group after another.
        """
        hidden = self._embed(previous, position, sum(group.rows for group in groups))  # [B, 1, D]
        both = self.model.rotary_angles()
        angles = None if both is None else both[1][:, position: position + 1]
        for layer, ((self_norm, self_attention), (cross_norm, cross), (ff_norm, feedforward)) in enumerate(self.blocks):
            hidden = hidden + self._self_attend(self_attention, self_norm(hidden), layer, position, angles, cache)
            hidden = hidden + self._cross_attend(cross, cross_norm(hidden), layer, groups)
            hidden = hidden + feedforward(ff_norm(hidden))
        return self.model.to_logits(self.model.decoder.final_norm(hidden))[:, 0]

    def _embed(self, previous: Tensor | None, position: int, rows: int) -> Tensor:
        model = self.model
        if previous is None:
            hidden = model.begin_of_image.expand(rows, 1, -1)
        else:
            hidden = model.image_embedding(previous)[:, None]
        if self.config.learned_positions:
            row, column = divmod(position, self.config.grid[1])
            hidden = hidden + model.row_position[row] + model.column_position[column]
        return hidden

    def _self_attend(self, attention: Any, hidden: Tensor, layer: int, position: int, angles: Tensor | None,
                     cache: SelfCache) -> Tensor:
        query = attention.split_q_heads(attention.to_q(hidden))  # [B, H, 1, d]
        key = attention.split_k_heads(attention.to_k(hidden))
        value = attention.split_v_heads(attention.to_v(hidden))
        if attention.q_rmsnorm is not None:
            query, key = attention.q_rmsnorm(query), attention.k_rmsnorm(key)
        if angles is not None:
            query, key = apply_rotary(query, angles), apply_rotary(key, angles)
        keys, values = cache.write(layer, position, key, value)
        out = F.scaled_dot_product_attention(query, keys, values, enable_gqa=keys.shape[1] != query.shape[1])
        return attention.to_out(attention.merge_heads(out))

    def _cross_attend(self, attention: Any, hidden: Tensor, layer: int, groups: list[CaptionMemory]) -> Tensor:
        query = attention.split_q_heads(attention.to_q(hidden))  # [B, H, 1, d]
        if attention.q_rmsnorm is not None:
            query = attention.q_rmsnorm(query)
        outs, start = [], 0
        for group in groups:
            part = query[start: start + group.rows, :, 0]  # [C*n, H, d]
            start += group.rows
            # the n rows of a caption become n queries over the caption's one set of keys
            part = part.unflatten(0, (group.captions, group.images)).transpose(1, 2)  # [C, H, n, d]
            out = F.scaled_dot_product_attention(part, group.keys[layer], group.values[layer], attn_mask=group.mask,
                                                 enable_gqa=group.keys[layer].shape[1] != part.shape[1])
            outs.append(out.transpose(1, 2).flatten(0, 1).flatten(1)[:, None])  # [C*n, 1, H*d]
        return attention.to_out(torch.cat(outs))
