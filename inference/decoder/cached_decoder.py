"""The serving graph: the parameters of either family in a lean decoder with a KV cache.

x-transformers stays the training graph; parity tests on logits hold the two together.
- `prefill` processes each caption once;
- `decode_one` computes logits of one image token for rows that are all at the same position;
- `decode_at` computes those of one or several tokens per row, each row at its own positions;
- `decode_layout` computes those of a layout token.
"""

# Axes: R rows, C captions, n images per caption, s slots per row in this step, P prefix slots,
#       S slots, N image tokens, T text slots, D width, K codebook size, L layout tokens

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.decoder.kv_cache import CaptionMemory, SelfCache
from inference.decoder.large_pages import LargePages
from inference.decoder.layers import AttentionShape, Norm, Slots, fuse_layers
from inference.decoder.projection import MatmulStrategy, WeightStorage, fuse_linears
from inference.decoder.slots import RowSlots, SharedSlots, additive_mask, rotary_factors
from seq2seq import DecoderOnly, EncoderDecoder, ImageTransformer, TextBatch


class CachedDecoder:
    """Takes over a transformer in eval mode: its parameters become views of fused matrices.

    int8: store the decoder's matrices in 8 bits (`inference.decoder.projection.Int8Projection`);
        embeddings and the text encoder stay as they are.
    matmul: how float matrices are stored and multiplied; `inference.decoder.calibration` finds the
        fastest here.
    """

    def __init__(self, model: ImageTransformer, int8: bool = False,
                 matmul: MatmulStrategy = MatmulStrategy()) -> None:  # noqa: B008  (a tuple)
        self.model = model.requires_grad_(False)
        self.config = model.config
        self.kv_heads = model.config.kv_heads or model.config.heads
        self.crosses = isinstance(model, EncoderDecoder)
        self.hides_text = bool(model.text_slots) and model.config.text_padding == "masked"

        storage = WeightStorage(int8, matmul, LargePages())
        shape = AttentionShape(model.config.heads, self.kv_heads, model.config.head_dim)
        self.layers = fuse_layers(model.decoder, self.crosses, shape, storage)
        self.final_norm = Norm(model.decoder.final_norm)
        self.to_logits = fuse_linears(model, ("to_logits",), storage)

        self._embedding = _input_embedding(model)
        positions = model.learned_image_positions()
        self._positions = None if positions is None else positions.detach()  # [N, D]
        self.rotations = rotary_factors(model.rotary_angles())
        # CUDA graphs; they live as long as the weights that they read
        # (`inference.generation.cuda_graph`)
        self.recorded_steps: OrderedDict[tuple, Any] = OrderedDict()

        self._native_to = matmul.native_to
        self._native: Callable[[Tensor, list[CaptionMemory], Slots], Tensor] | None = None
        if matmul.native_to:
            from inference.decoder.native.step import NativeStep

            self._native = NativeStep(self)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self._embedding.device

    @property
    def begin(self) -> int:
        """Input id of the begin slot, K, before token 0; models without one never read it."""
        return self.config.codebook_size

    @property
    def first_position(self) -> int:
        """First position of a step: 1 if the text's last slot predicts token 0, else 0."""
        return 0 if self.model.begin_of_image_slot else 1

    @property
    def slots(self) -> int:
        """S: slots of a row's whole sequence."""
        return self.model.prefix_slots + self.model.image_slots

    @torch.inference_mode()
    def prefill(self, text: TextBatch, images: int) -> CaptionMemory:
        """Process C captions once, for `images` rows each."""
        if self.crosses:
            return self._encode_captions(text, images)
        return self._prefill_text(text, images)

    def _encode_captions(self, text: TextBatch, images: int) -> CaptionMemory:
        """Run the text encoder and compute cross-attention keys and values of every layer."""
        assert isinstance(self.model, EncoderDecoder)
        length = _longest(text.text_mask)  # slots that are padding in every caption are dropped
        memory = self.model.encode_text(*text)[:, :length]  # [C, T, D]
        mask = text.text_mask[:, :length]  # [C, T]

        keys, values = [], []
        for layer in self.layers:
            if layer.cross_attention is not None:
                layer_keys, layer_values = layer.cross_attention.keys_values(memory)
                keys.append(layer_keys)
                values.append(layer_values)
        seen = None if bool(mask.all()) else mask
        return CaptionMemory(keys, values, seen, len(mask), images)

    def _prefill_text(self, text: TextBatch, images: int) -> CaptionMemory:
        """Run the text slots of a decoder-only model, one row per caption."""
        assert isinstance(self.model, DecoderOnly)
        captions = len(text.text_mask)
        text_slots = self.model.text_slots
        hidden = self.model.embed_prefix(*text, None)  # [C, T, D]

        cache = self._empty_cache(captions, text_slots)
        prefix_mask = self.model.prefix_mask(text.text_mask)
        cache.seen = None if prefix_mask is None else prefix_mask[:, :text_slots]

        slots = SharedSlots(cache, 0, text_slots, self.rotations)
        out = self._run_layers(hidden.flatten(0, 1), [], slots)
        last = out.unflatten(0, (captions, -1))[:, -1]  # [C, D]
        keys, values = list(cache.keys), list(cache.values)
        return CaptionMemory(keys, values, cache.seen, captions, images, last)

    def _empty_cache(self, rows: int, slots: int, hides: bool = False) -> SelfCache:
        head_dim = self.config.head_dim
        return SelfCache.empty(
            len(self.layers), rows, self.kv_heads, slots, head_dim, self._embedding, hides)

    def rows_cache(self, rows: int) -> SelfCache:
        """Allocate an empty self-attention cache for `rows` rows."""
        return self._empty_cache(rows, self.slots, self.hides_text)

    def empty_memory(self, captions: int) -> CaptionMemory:
        """Allocate memory for captions of any length; without keys if text is in the cache."""
        if not self.crosses:
            return CaptionMemory([], [], None, captions, 1)

        shape = (captions, self.kv_heads, self.config.text_length, self.config.head_dim)
        keys = [self._embedding.new_zeros(shape) for _ in self.layers]
        values = [self._embedding.new_zeros(shape) for _ in self.layers]
        seen = torch.ones(captions, self.config.text_length, dtype=torch.bool, device=self.device)
        return CaptionMemory(keys, values, seen, captions, 1)

    def new_cache(self, groups: list[CaptionMemory]) -> SelfCache:
        """Allocate a self-attention cache for the rows of `groups` and put their text into it."""
        cache = self.rows_cache(sum(group.rows for group in groups))
        start = 0
        for group in groups:
            self.put_text(group, cache.rows(start, group.rows))
            start += group.rows
        return cache

    def put_text(self, group: CaptionMemory, cache: SelfCache) -> None:
        """Copy a group's text into the cache of its rows, if text is part of the sequence."""
        text_slots = self.model.text_slots
        if not text_slots:
            return

        rows_of_captions = (group.captions, group.images)
        for layer in range(len(self.layers)):
            for buffer, part in ((cache.keys, group.keys), (cache.values, group.values)):
                text_part = buffer[layer, :, :, :text_slots]  # [R, G, T, d]
                text_part.unflatten(0, rows_of_captions).copy_(part[layer][:, None])
        if cache.seen is not None and group.seen is not None:
            cache.seen[:, :text_slots] = group.seen.repeat_interleave(group.images, dim=0)

    @torch.inference_mode()
    def first_logits(self, groups: list[CaptionMemory]) -> Tensor:
        """Logits [R, K] of token 0 for models in which the text's last slot predicts it."""
        last = [_last_output(group).repeat_interleave(group.images, dim=0) for group in groups]
        return self.to_logits(torch.cat(last))

    @torch.inference_mode()
    def decode_one(self, previous: Tensor | None, position: int, groups: list[CaptionMemory],
                   cache: SelfCache) -> Tensor:
        """Logits [R, K] of image token `position`; previous: the token before it [R], None at 0.

        The rows are those of the groups, in order. A layout, if any, must be in the cache already
        (`decode_layout`).
        """
        if previous is None:
            if position < self.first_position:
                return self.first_logits(groups)
            previous = torch.full((cache.row_count,), self.begin, device=self.device)

        image_slot = position - self.first_position
        hidden = F.embedding(previous, self._embedding)  # [R, D]
        if self._positions is not None:
            hidden = hidden + self._positions[image_slot]
        slots = SharedSlots(cache, self.model.prefix_slots + image_slot, 1, self.rotations)
        return self._logits(self.model.normed(hidden), groups, slots)

    @torch.inference_mode()
    def decode_at(self, previous: Tensor, positions: Tensor, groups: list[CaptionMemory],
                  cache: SelfCache, end: int | None = None) -> Tensor:
        """Logits [R, s, K] of image tokens `positions` [R, s] from the tokens before them [R, s]
        (`begin` before token 0).

        A row's earlier tokens must be in the cache; cache content from its first position on is
        overwritten and not seen.
        end: a position above all of these, if the caller knows one; slots from it on are not read.
        """
        image_slots = positions - self.first_position  # [R, s]
        hidden = F.embedding(previous, self._embedding)  # [R, s, D]
        if self._positions is not None:
            hidden = hidden + F.embedding(image_slots, self._positions)

        if end is None:
            last = self.slots
        else:
            last = self.model.prefix_slots + end - self.first_position
        slots = RowSlots(cache, image_slots + self.model.prefix_slots, last, self.rotations)
        logits = self._logits(self.model.normed(hidden).flatten(0, 1), groups, slots)  # [R * s, K]
        return logits.unflatten(0, previous.shape)

    @torch.inference_mode()
    def decode_layout(self, tokens: Tensor, first: int, groups: list[CaptionMemory],
                      cache: SelfCache) -> Tensor:
        """Put layout `tokens` [R, s] into the cache -> logits [R, classes] of the next one.

        The tokens have numbers `first` .. `first` + s - 1; number 0 comes with the layout's begin
        slot before it. After the last layout token the logits have no meaning.
        """
        model = self.model
        # embed_layout wants the whole layout so far; embeddings before `first` are computed and not
        # used
        hidden = model.embed_layout(F.pad(tokens, (first, 0)))  # [R, first + s + 1, D]
        start = 0 if first == 0 else first + 1
        hidden = hidden[:, start:]
        slots = SharedSlots(cache, model.text_slots + start, hidden.shape[1], self.rotations)
        out = self._run_layers(hidden.flatten(0, 1), groups, slots)
        return model.to_layout_logits(out.unflatten(0, (len(tokens), -1))[:, -1])

    def _logits(self, hidden: Tensor, groups: list[CaptionMemory], slots: Slots) -> Tensor:
        """Inputs [R * s, D], possibly overwritten -> logits [R * s, K]; fills the cache."""
        if self._native is not None and len(hidden) <= self._native_to:
            return self._native(hidden, groups, slots)
        return self.to_logits(self._run_layers(hidden, groups, slots))

    def _run_layers(self, hidden: Tensor, groups: list[CaptionMemory], slots: Slots) -> Tensor:
        """Inputs [R * s, D] -> normed outputs [R * s, D]; fills the cache."""
        masks: list[Tensor | None] = []  # of each group's text
        for group in groups:
            if group.seen is None or not self.crosses:
                masks.append(None)
            else:
                masks.append(additive_mask(group.seen[:, None, None, :], hidden.dtype))

        for number, layer in enumerate(self.layers):
            hidden = layer.self_attention(hidden, number, slots)
            if layer.cross_attention is not None:
                hidden = layer.cross_attention(hidden, number, groups, masks)
            hidden = layer.feedforward(hidden)
        return self.final_norm(hidden)


def _input_embedding(model: ImageTransformer) -> Tensor:
    """Image token embeddings [K, D], or [K + 1, D] with the begin slot as one more token, K."""
    table = model.image_embedding.weight.detach()
    if not model.begin_of_image_slot:
        return table
    joined = torch.cat([table, model.begin_of_image.detach()[None]])
    model.image_embedding.weight.data = joined[:-1]
    model.begin_of_image.data = joined[-1]
    return joined


def _longest(text_mask: Tensor) -> int:
    """Slots up to the last one that is real in any caption; at least 1."""
    used = text_mask.any(dim=0).nonzero()
    return int(used[-1]) + 1 if len(used) else 1


def _last_output(group: CaptionMemory) -> Tensor:
    assert group.last is not None, "a decoder-only model's prefill keeps the text's last output"
    return group.last
