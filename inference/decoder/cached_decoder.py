"""The serving graph: the trained parameters of either family, fused and read into a lean decoder with a KV cache.

x-transformers stays the training graph; parity tests on logits hold the two together. `prefill` works through each caption
once, `decode_one` computes one image token's logits for rows that are all at one position, `decode_at` those of rows at
positions of their own, one or several a row, and `decode_layout` those of a layout token.
"""

# Axes: R rows, C captions, n images a caption, s slots at once, P prefix slots, S slots, N image tokens, T text slots, D width,
#       K codebook size, L layout tokens

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.decoder.kv_cache import CaptionMemory, SelfCache
from inference.decoder.large_pages import LargePages
from inference.decoder.layers import CrossAttention, FeedForward, Norm, SelfAttention, Slots
from inference.decoder.projection import Plan, Way, project
from inference.decoder.slots import RowSlots, SharedSlots, added
from seq2seq import DecoderOnly, EncoderDecoder, ImageTransformer, TextBatch
from seq2seq.layers import layer_blocks


class CachedDecoder:
    """Takes a transformer in eval mode over: its parameters become views of fused ones, with the same names and values.

    int8: the decoder's matrices in 8 bits (`inference.decoder.projection.Int8Projection`); embeddings and the text encoder stay.
    way: how float matrices lie in memory and are multiplied; `inference.decoder.calibration` says what is fastest here.
    """

    def __init__(self, model: ImageTransformer, int8: bool = False, way: Way = Way()) -> None:  # noqa: B008  (a tuple)
        self.model = model.requires_grad_(False)
        self.config = config = model.config
        self.kv_heads = config.kv_heads or config.heads
        self.crosses = isinstance(model, EncoderDecoder)
        plan = Plan(int8, way, LargePages())
        shape = (config.heads, self.kv_heads, config.head_dim, plan)
        self.layers: list[tuple[SelfAttention, CrossAttention | None, FeedForward]] = []
        for blocks in layer_blocks(model.decoder, cross_attend=self.crosses):
            cross = CrossAttention(blocks[1], *shape) if self.crosses else None
            self.layers.append((SelfAttention(blocks[0], *shape), cross, FeedForward(blocks[-1], plan)))
        self.final_norm = Norm(model.decoder.final_norm)
        self.to_logits = project(model, ("to_logits",), plan)
        table = model.image_embedding.weight.detach()
        self._embedding = table
        if model.begin_of_image_slot:  # the begin slot is one more entry, K, so that no step asks whether it is the first
            self._embedding = torch.cat([table, model.begin_of_image.detach()[None]])  # [K + 1, D]
            model.image_embedding.weight.data = self._embedding[:-1]
            model.begin_of_image.data = self._embedding[-1]
        learned = model.learned_image_positions()
        self._positions = None if learned is None else learned.detach()  # [N, D]
        angles = model.rotary_angles()
        self.turns = None if angles is None else torch.polar(torch.ones_like(angles[0, :, ::2]), angles[0, :, ::2])  # [S, d/2]
        self.recorded_steps: OrderedDict[tuple, Any] = OrderedDict()  # `inference.generation.cuda_graph` keeps them here
        self.hides_text = bool(model.text_slots) and config.text_padding == "masked"
        self._native_to = way.native_to
        self._native: Callable[[Tensor, list[CaptionMemory], Slots], Tensor] | None = None
        if way.native_to:
            from inference.decoder.native.step import NativeStep

            self._native = NativeStep(self)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._embedding.device

    @property
    def begin(self) -> int:
        """What stands before token 0: the number of the begin slot, K. Models without one never read it."""
        return self.config.codebook_size

    @property
    def first_position(self) -> int:
        """The first position that a step computes: 1 for models whose text's last slot predicts token 0, else 0."""
        return 0 if self.model.begin_of_image_slot else 1

    @torch.inference_mode()
    def prefill(self, text: TextBatch, images: int) -> CaptionMemory:
        """Work through C captions once, for `images` rows each."""
        model = self.model
        captions = len(text.text_mask)
        if isinstance(model, EncoderDecoder):
            length = _longest(text.text_mask)  # what is padding in every caption is not kept
            memory, mask = model.encode_text(*text)[:, :length], text.text_mask[:, :length]  # [C, T, D], [C, T]
            both = [cross.keys_values(memory) for _, cross, _ in self.layers if cross is not None]
            seen = None if bool(mask.all()) else mask
            return CaptionMemory([keys for keys, _ in both], [values for _, values in both], seen, captions, images)
        assert isinstance(model, DecoderOnly)
        hidden = model.embed_prefix(*text, None)  # [C, T, D]
        cache = self._empty_cache(captions, model.text_slots)
        shown = model.prefix_mask(text.text_mask)
        cache.seen = None if shown is None else shown[:, : model.text_slots]
        out = self._run(hidden.flatten(0, 1), [], SharedSlots(cache, 0, model.text_slots, self.turns))
        return CaptionMemory(list(cache.keys), list(cache.values), cache.seen, captions, images,
                             out.unflatten(0, (captions, -1))[:, -1])

    def _empty_cache(self, rows: int, slots: int, hides: bool = False) -> SelfCache:
        return SelfCache.empty(len(self.layers), rows, self.kv_heads, slots, self.config.head_dim, self._embedding, hides)

    @property
    def slots(self) -> int:
        """S: slots of a row's whole sequence."""
        return self.model.prefix_slots + self.model.image_slots

    def rows_cache(self, rows: int) -> SelfCache:
        """An empty self-attention cache for `rows` rows."""
        return self._empty_cache(rows, self.slots, self.hides_text)

    def empty_memory(self, captions: int) -> CaptionMemory:
        """Room for the memory of `captions` captions of any length, one row each; without keys where text is in the cache."""
        if not self.crosses:
            return CaptionMemory([], [], None, captions, 1)
        shape = (captions, self.kv_heads, self.config.text_length, self.config.head_dim)
        keys, values = ([torch.zeros(shape, dtype=self._embedding.dtype, device=self.device) for _ in self.layers]
                        for _ in range(2))
        seen = torch.ones(captions, self.config.text_length, dtype=torch.bool, device=self.device)
        return CaptionMemory(keys, values, seen, captions, 1)

    def new_cache(self, groups: list[CaptionMemory]) -> SelfCache:
        """A self-attention cache for the rows of `groups`, with their text in it where text is part of the sequence."""
        cache = self.rows_cache(sum(group.rows for group in groups))
        start = 0
        for group in groups:
            self.put_text(group, cache.rows(start, group.rows))
            start += group.rows
        return cache

    def put_text(self, group: CaptionMemory, cache: SelfCache) -> None:
        """A group's text into the cache of its rows, where text is part of the sequence."""
        text = self.model.text_slots
        if not text:
            return
        for layer in range(len(self.layers)):
            for buffer, part in ((cache.keys, group.keys), (cache.values, group.values)):
                buffer[layer, :, :, :text].unflatten(0, (group.captions, group.images)).copy_(part[layer][:, None])
        if cache.seen is not None and group.seen is not None:
            cache.seen[:, :text] = group.seen.repeat_interleave(group.images, dim=0)

    @torch.inference_mode()
    def first_logits(self, groups: list[CaptionMemory]) -> Tensor:
        """Logits [R, K] of token 0 for models without a begin slot: the text's last slot predicts it."""
        return self.to_logits(torch.cat([_last(g).repeat_interleave(g.images, dim=0) for g in groups]))

    @torch.inference_mode()
    def decode_one(self, previous: Tensor | None, position: int, groups: list[CaptionMemory], cache: SelfCache) -> Tensor:
        """Logits [R, K] of image token `position`, from the token before it [R] (None at position 0).

        The rows are those of the groups, one group after another. A layout comes first, through `decode_layout`.
        """
        if previous is None:
            if position < self.first_position:
                return self.first_logits(groups)
            previous = torch.full((cache.row_count,), self.begin, device=self.device)
        image_slot = position - self.first_position
        hidden = F.embedding(previous, self._embedding)
        if self._positions is not None:
            hidden = hidden + self._positions[image_slot]
        slots = SharedSlots(cache, self.model.prefix_slots + image_slot, 1, self.turns)
        return self._logits(self.model.normed(hidden), groups, slots)

    @torch.inference_mode()
    def decode_at(self, previous: Tensor, positions: Tensor, groups: list[CaptionMemory], cache: SelfCache,
                  end: int | None = None) -> Tensor:
        """Logits [R, s, K] of image tokens `positions` [R, s] of each row, from the tokens before them [R, s] (`begin` before
        token 0). Tokens of a row before these are in the cache; what is there from these on is replaced, not seen.

        end: a position above all of these, where the caller knows one; slots from it on are not looked at.
        """
        image_slots = positions - self.first_position  # [R, s]
        hidden = F.embedding(previous, self._embedding)
        if self._positions is not None:
            hidden = hidden + F.embedding(image_slots, self._positions)
        last = self.slots if end is None else self.model.prefix_slots + end - self.first_position
        slots = RowSlots(cache, image_slots + self.model.prefix_slots, last, self.turns)
        return self._logits(self.model.normed(hidden).flatten(0, 1), groups, slots).unflatten(0, previous.shape)

    @torch.inference_mode()
    def decode_layout(self, tokens: Tensor, first: int, groups: list[CaptionMemory], cache: SelfCache) -> Tensor:
        """Put layout tokens [R, s] (numbers `first` .. `first` + s - 1) into the cache, with the begin slot before number 0
        -> logits [R, classes] of the layout token after them (of no meaning after the last one)."""
        model = self.model
        hidden = model.embed_layout(F.pad(tokens, (first, 0)))  # [R, first + s + 1, D]; what is before `first` is not used
        start = 0 if first == 0 else first + 1
        slots = SharedSlots(cache, model.text_slots + start, hidden.shape[1] - start, self.turns)
        out = self._run(hidden[:, start:].flatten(0, 1), groups, slots)
        return model.to_layout_logits(out.unflatten(0, (len(tokens), -1))[:, -1])

    def _logits(self, hidden: Tensor, groups: list[CaptionMemory], slots: Slots) -> Tensor:
        """Inputs [R * s, D], which may be written over, -> logits [R * s, K]; their keys and values go into the cache."""
        if self._native is not None and len(hidden) <= self._native_to:
            return self._native(hidden, groups, slots)
        return self.to_logits(self._run(hidden, groups, slots))

    def _run(self, hidden: Tensor, groups: list[CaptionMemory], slots: Slots) -> Tensor:
        """Inputs [R * s, D] -> normed outputs [R * s, D]; their keys and values go into the cache."""
        masks = [None if group.seen is None or not self.crosses else added(group.seen[:, None, None, :], hidden.dtype)
                 for group in groups]
        for layer, (attend, cross, feed) in enumerate(self.layers):
            hidden = attend(hidden, layer, slots)
            if cross is not None:
                hidden = cross(hidden, layer, groups, masks)
            hidden = feed(hidden)
        return self.final_norm(hidden)


def _longest(text_mask: Tensor) -> int:
    """Slots up to the last one that is real in any caption; at least 1."""
    used = text_mask.any(dim=0).nonzero()
    return int(used[-1]) + 1 if len(used) else 1


def _last(group: CaptionMemory) -> Tensor:
    assert group.last is not None, "a decoder-only model's prefill keeps the text's last output"
    return group.last
