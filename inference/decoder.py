"""The serving graph: the trained parameters of either family, read into a plain decoder with a KV cache.

x-transformers stays the training graph; a parity test on logits holds the two together. `prefill` works through each caption
once, `decode_one` computes one image token's logits for all rows, `decode_layout` those of a layout token.
"""

# Axes: B rows, C captions, n images a caption, s slots at once, H heads, G key/value heads, P prefix slots, N image tokens,
#       T text slots, D width, d head width

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.kv_cache import CaptionMemory, SelfCache
from seq2seq import DecoderOnly, EncoderDecoder, ImageTransformer, TextBatch
from seq2seq.attention import Pattern
from seq2seq.layers import blinded, layer_blocks
from seq2seq.positions import apply_rotary


class CachedDecoder:
    """Reads a transformer in eval mode; holds no weights of its own."""

    def __init__(self, model: ImageTransformer) -> None:
        self.model = model
        self.config = model.config
        self.crosses = isinstance(model, EncoderDecoder)
        self.layers = layer_blocks(model.decoder, cross_attend=self.crosses)
        self._visible: dict[tuple[Pattern, int], Tensor] = {}

    @torch.inference_mode()
    def prefill(self, text: TextBatch, images: int) -> CaptionMemory:
        """Work through C captions once, for `images` rows each."""
        model = self.model
        captions = len(text.text_mask)
        if isinstance(model, EncoderDecoder):
            memory = model.encode_text(*text)  # [C, T, D]
            keys, values = [], []
            for _, cross, _ in self.layers:
                attention = cross.block
                key, value = attention.split_k_heads(attention.to_k(memory)), attention.split_v_heads(attention.to_v(memory))
                keys.append(key if attention.k_rmsnorm is None else attention.k_rmsnorm(key))
                values.append(value)
            return CaptionMemory(keys, values, text.text_mask, captions, images)
        assert isinstance(model, DecoderOnly)
        hidden = model.embed_prefix(*text, None)  # [C, T, D]
        cache = self._empty_cache(captions, model.text_slots)
        mask = model.prefix_mask(text.text_mask)
        cache.seen = None if mask is None else mask[:, : model.text_slots]
        out = self._run(hidden, 0, [], cache)
        return CaptionMemory(list(cache.keys), list(cache.values), cache.seen, captions, images, out[:, -1])

    def new_cache(self, groups: list[CaptionMemory]) -> SelfCache:
        """A self-attention cache for the rows of `groups`, with their text in it where text is part of the sequence."""
        cache = self._empty_cache(sum(group.rows for group in groups), self.model.prefix_slots + self.model.image_slots)
        text = self.model.text_slots
        if text:
            for layer in range(len(self.layers)):
                for buffer, parts in ((cache.keys, [g.keys for g in groups]), (cache.values, [g.values for g in groups])):
                    buffer[layer, :, :, :text] = torch.cat(
                        [part[layer].repeat_interleave(g.images, dim=0) for part, g in zip(parts, groups, strict=True)])
            if groups[0].seen is not None:
                seen = torch.cat([g.seen.repeat_interleave(g.images, dim=0) for g in groups if g.seen is not None])
                cache.seen = F.pad(seen, (0, cache.keys.shape[3] - text), value=True)  # [B, S]
        return cache

    def _empty_cache(self, rows: int, slots: int) -> SelfCache:
        config = self.config
        return SelfCache(len(self.layers), rows, config.kv_heads or config.heads, slots, config.head_dim,
                         like=self.model.to_logits.weight)

    @torch.inference_mode()
    def decode_one(self, previous: Tensor | None, position: int, groups: list[CaptionMemory], cache: SelfCache) -> Tensor:
        """Logits [B, K] of image token `position`, from the token before it [B] (None at position 0).

        The rows are those of the groups, one group after another. A layout comes first, through `decode_layout`.
        """
        model = self.model
        if previous is None and not model.begin_of_image_slot:
            hidden = torch.cat([_last(g).repeat_interleave(g.images, dim=0) for g in groups])  # [B, D]
            return model.to_logits(hidden)
        slot = position if model.begin_of_image_slot else position - 1
        if previous is None:
            hidden = model.begin_of_image.expand(sum(group.rows for group in groups), -1)
        else:
            hidden = model.image_embedding(previous)
        positions = model.learned_image_positions()
        hidden = model.normed(hidden if positions is None else hidden + positions[slot])[:, None]  # [B, 1, D]
        return model.to_logits(self._run(hidden, model.prefix_slots + slot, groups, cache))[:, 0]

    @torch.inference_mode()
    def decode_layout(self, tokens: Tensor, first: int, groups: list[CaptionMemory], cache: SelfCache) -> Tensor:
        """Put layout tokens [B, s] (numbers `first` .. `first` + s - 1) into the cache, with the begin slot before number 0
        -> logits [B, classes] of the layout token after them (of no meaning after the last one)."""
        model = self.model
        hidden = model.embed_layout(F.pad(tokens, (first, 0)))  # [B, first + s + 1, D]; what is before `first` is not used
        start = 0 if first == 0 else first + 1
        out = self._run(hidden[:, start:], model.text_slots + start, groups, cache)
        return model.to_layout_logits(out[:, -1])

    def _run(self, hidden: Tensor, first: int, groups: list[CaptionMemory], cache: SelfCache) -> Tensor:
        """Inputs [B, s, D] of slots `first` and on -> normed outputs [B, s, D]; their keys and values go into the cache."""
        angles = self.model.rotary_angles()
        if angles is not None:
            angles = angles[:, first: first + hidden.shape[1]]
        for layer, blocks in enumerate(self.layers):
            for index, block in enumerate(blocks):
                inner = block.norm(hidden)
                if index == 0:
                    out = self._self_attend(block.block, inner, layer, first, angles, cache)
                elif index < len(blocks) - 1:
                    out = self._cross_attend(block.block, inner, layer, groups)
                else:
                    out = block.block(inner)
                hidden = hidden + block.norm_after(out)
        return self.model.decoder.final_norm(hidden)

    def _self_attend(self, attention: Any, hidden: Tensor, layer: int, first: int, angles: Tensor | None,
                     cache: SelfCache) -> Tensor:
        query = attention.split_q_heads(attention.to_q(hidden))  # [B, H, s, d]
        key = attention.split_k_heads(attention.to_k(hidden))
        value = attention.split_v_heads(attention.to_v(hidden))
        if attention.q_rmsnorm is not None:
            query, key = attention.q_rmsnorm(query), attention.k_rmsnorm(key)
        if angles is not None:
            query, key = apply_rotary(query, angles), apply_rotary(key, angles)
        if attention.attend.blind_slots > first:
            blind = min(attention.attend.blind_slots - first, query.shape[2])
            query, key = blinded(query, blind), blinded(key, blind)
        keys, values = cache.write(layer, first, key, value)
        seen = None if cache.seen is None else cache.seen[:, None, None, : keys.shape[2]]  # [B, 1, 1, keys]
        if query.shape[2] > 1:
            mask = self._mask(attention.attend.pattern, first, keys.shape[2]).to(query.device)
            seen = mask if seen is None else seen & mask
        elif attention.attend.pattern.name != "full" and first >= self.model.prefix_slots:
            visible = self._visible_slots(attention.attend.pattern, first - self.model.prefix_slots)
            keys, values = keys[:, :, visible], values[:, :, visible]
            seen = None if seen is None else seen[..., visible]
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, enable_gqa=keys.shape[1] != query.shape[1])
        return attention.to_out(attention.merge_heads(out))

    def _mask(self, pattern: Pattern, first: int, slots: int) -> Tensor:
        """[s, slots] bool for queries `first` .. slots - 1."""
        return pattern.mask(slots)[first:]

    def _visible_slots(self, pattern: Pattern, image_slot: int) -> Tensor:
        if (pattern, image_slot) not in self._visible:
            self._visible[pattern, image_slot] = pattern.visible_slots(image_slot).to(self.model.to_logits.weight.device)
        return self._visible[pattern, image_slot]

    def _cross_attend(self, attention: Any, hidden: Tensor, layer: int, groups: list[CaptionMemory]) -> Tensor:
        query = attention.split_q_heads(attention.to_q(hidden))  # [B, H, s, d]
        if attention.q_rmsnorm is not None:
            query = attention.q_rmsnorm(query)
        slots = query.shape[2]
        outs, start = [], 0
        for group in groups:
            part = query[start: start + group.rows]  # [C*n, H, s, d]
            start += group.rows
            # the n rows of a caption become n*s queries over the caption's one set of keys
            part = part.unflatten(0, (group.captions, group.images)).transpose(1, 2).flatten(2, 3)  # [C, H, n*s, d]
            mask = None if group.seen is None else group.seen[:, None, None, :]
            out = F.scaled_dot_product_attention(part, group.keys[layer], group.values[layer], attn_mask=mask,
                                                 enable_gqa=group.keys[layer].shape[1] != part.shape[1])
            out = out.unflatten(2, (group.images, slots)).transpose(1, 2)  # [C, n, H, s, d]
            outs.append(out.flatten(0, 1))
        return attention.to_out(attention.merge_heads(torch.cat(outs)))


def _last(group: CaptionMemory) -> Tensor:
    assert group.last is not None, "a decoder-only model's prefill keeps the text's last output"
    return group.last
