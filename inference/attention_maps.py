"""Attention maps: how much each image token attended to each word of its caption.

Cross-attention (encoder-decoder) or the image slots' attention to the text slots (decoder-only),
averaged over layers and heads. After Hertz et al. 2022 (https://arxiv.org/abs/2208.01626), who do
it for diffusion models.
"""

# Axes: B images, H heads, n slots, N image tokens, T text positions, P prefix slots, h w code grid,
#       d head width

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
import torch
from PIL import Image
from torch import Tensor

from seq2seq import EncoderDecoder, ImageTransformer, TextBatch, TextSource
from seq2seq.layers import blinded, layer_blocks
from tokenloom_common.errors import UserError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a piece of a character that the vocabulary lacks
_UNKNOWN_PIECES = ("[UNK]", "<unk>")
_UNKNOWN = "\ufffd"
_WORD_START_MARKS = ("▁", "Ġ")
"""Of SentencePiece and byte-level BPE.

CLIP's BPE ends words in </w>, WordPiece continues them with ##.
"""


class WordMap(NamedTuple):
    """A word of a prompt, prompt[start:end], and the attention [h, w] float32 that it got."""

    word: str
    start: int
    end: int
    weights: Tensor


def attention_map(model: ImageTransformer, text: TextBatch, positions: list[int],
                  image_tokens: Tensor, layout: Tensor | None = None) -> Tensor:
    """Return the attention [h, w] float32 of image_tokens [1, N] to positions of their caption.

    positions: numbers among the caption's real positions, as word_positions returns them.
    """
    return attention_maps(model, text, [positions], image_tokens, layout)[0]


def word_maps(model: ImageTransformer, source: TextSource, text: TextBatch, prompt: str,
              image_tokens: Tensor, layout: Tensor | None = None) -> list[WordMap]:
    """Return what attention_map does for every word of a prompt, in one forward pass.

    text: of the prompt, as `source` encodes it. Words as split_words has them.
    """
    words = split_words(source, prompt)
    positions = [pieces for _, pieces in words]
    maps = attention_maps(model, text, positions, image_tokens, layout)
    return [WordMap(prompt[at.start: at.stop], at.start, at.stop, weights)
            for (at, _), weights in zip(words, maps, strict=True)]


def attention_maps(model: ImageTransformer, text: TextBatch, words: Sequence[list[int]],
                   image_tokens: Tensor, layout: Tensor | None = None) -> list[Tensor]:
    """Do what attention_map does for the positions of several words, in one forward pass."""
    real = text.text_mask[0].nonzero().flatten()  # a caption may be padded on its left
    if layout is not None:
        layout = layout.to(image_tokens.device)
    weights = attention_to_text(model, text, image_tokens, layout)
    maps = []
    for positions in words:
        # summed, not averaged: the share of attention that a word of several pieces gets
        to_word = weights[0, :, real[positions]].sum(dim=-1)  # [N]
        maps.append(to_word.reshape(model.config.grid).cpu())
    return maps


@torch.inference_mode()
def attention_to_text(model: ImageTransformer, text: TextBatch, image_tokens: Tensor,
                      layout: Tensor | None = None) -> Tensor:
    """Return the weights [B, N, T] float32 of text positions for image_tokens [B, N].

    Of the slots that predict them, from one forward pass. Encoder-decoder: they sum to 1 over the
    real positions. Decoder-only: to what is left beside image and layout.
    """
    crosses = isinstance(model, EncoderDecoder)
    layers = layer_blocks(model.decoder, cross_attend=crosses)
    total = torch.zeros(())

    # the models' fused attention does not return its weights: compute them again from its inputs
    def record(attend: Any, args: tuple, kwargs: dict) -> None:
        nonlocal total
        query, key = args[0].float(), args[1].float()
        mask = kwargs.get("mask")
        if crosses:
            weights = _cross_weights(query, key, mask)
        else:
            weights = _self_weights(attend, query, key, mask)
        total = total + weights.mean(dim=1)

    # the blocks of a layer: self-attention, cross-attention (if it has one), feed-forward
    block = 1 if crosses else 0
    attentions = [blocks[block].block.attend for blocks in layers]
    hooks = [attend.register_forward_pre_hook(record, with_kwargs=True) for attend in attentions]
    try:
        model(*text, image_tokens, layout)
    finally:
        for hook in hooks:
            hook.remove()

    # without a begin slot, the last slot of the prefix predicts token 0
    first = model.prefix_slots if model.begin_of_image_slot else model.prefix_slots - 1
    weights = total[:, first: first + model.config.num_tokens] / len(layers)  # [B, N, keys]
    start = 0 if crosses else model.text_slots - model.config.text_length
    return weights[..., start: start + model.config.text_length]


def _cross_weights(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Return cross-attention weights [B, H, n, T]."""
    if mask is None:
        mask = torch.ones(1, dtype=torch.bool, device=query.device)
    return _softmax(query, key, mask)


def _self_weights(attend: Any, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Return self-attention weights [B, H, n, n] under the layer's own pattern."""
    slots = query.shape[2]
    if attend.blind_slots:
        query = blinded(query, attend.blind_slots)
        key = blinded(key, attend.blind_slots)
    seen = attend.pattern.mask(slots).to(query.device)
    if mask is not None:
        # the mask is of the text alone; all that follows it is real
        image_shape = (*mask.shape[:-1], slots - mask.shape[-1])
        image_mask = torch.ones(image_shape, dtype=torch.bool, device=mask.device)
        seen = seen & torch.cat([mask, image_mask], dim=-1)
    return _softmax(query, key, seen)


def _softmax(query: Tensor, key: Tensor, seen: Tensor) -> Tensor:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # grouped-query attention
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)


# ---- words and their positions


def word_positions(source: TextSource, caption: str, word: str) -> list[int]:
    """Return the positions of a caption's text input that hold `word`, every time that it occurs.

    `word` may be several words in a row. UserError with the caption's pieces if it is not there.
    """
    pieces = source.words(caption)
    bare = [_bare(piece) for piece in pieces]
    starts = _word_starts(pieces)
    wanted = "".join(word.casefold().split())
    found: set[int] = set()
    for first, is_start in enumerate(starts):
        if not is_start:
            continue
        joined = ""
        for last in range(first, len(pieces)):
            if _is_special(pieces[last]):
                break
            joined += bare[last]
            following = last + 1
            ends = following == len(pieces) or starts[following] or _is_special(pieces[following])
            # a whole word: "cat" is not found at the start of "cats"
            if joined == wanted and ends:
                found |= set(range(first, following))
            if not wanted.startswith(joined):
                break
    if not wanted or not found:
        shown = " ".join(filter(None, bare))
        raise UserError(f"the caption '{caption}' has no word '{word}'; its pieces: {shown}")
    return sorted(found)


def split_words(source: TextSource, caption: str) -> list[tuple[range, list[int]]]:
    """Return each word's characters of a caption, and its positions of the caption's text input.

    Words are what spaces separate. Several are one where the vocabulary has them as one (class
    labels); those that the text length has no room for are left out.
    """
    pieces = source.words(caption)
    groups = _grouped(pieces)
    spaced = any(mark in "".join(pieces) for mark in _WORD_START_MARKS)
    written = [(match.start(), match.group()) for match in re.finditer(r"\S+", caption)]
    words: list[tuple[range, list[int]]] = []
    while written and groups:
        start, text = written.pop(0)
        positions, bare = groups.pop(0)
        end = start + len(text)
        # a vocabulary without marks of spaces: both sides grow until they are of one length
        wanted = len(text.casefold())
        while not spaced and len(bare) != wanted and _UNKNOWN not in bare:
            if len(bare) < wanted and groups:
                more, following = groups.pop(0)
                positions = positions + more
                bare += following
            elif len(bare) > wanted and written:
                next_start, text = written.pop(0)
                end = next_start + len(text)
                wanted += len(text.casefold())
            else:
                break
        words.append((range(start, end), positions))
    return words


def _grouped(pieces: list[str]) -> list[tuple[list[int], str]]:
    """Return positions and text of the pieces of each word."""
    starts = _word_starts(pieces)
    groups: list[tuple[list[int], str]] = []
    for position, piece in enumerate(pieces):
        if _is_special(piece):
            continue
        if starts[position] or not groups:
            groups.append(([position], _bare(piece)))
        else:
            positions, text = groups[-1]
            groups[-1] = [*positions, position], text + _bare(piece)
    return groups


def _word_starts(pieces: list[str]) -> list[bool]:
    """Say of each piece whether it starts a word, by the marks of the vocabulary."""
    text = "".join(pieces)
    start_marks = [mark for mark in _WORD_START_MARKS if mark in text]
    start_mark = start_marks[0] if start_marks else None
    has_end_marks = any(piece.endswith("</w>") for piece in pieces)

    starts = []
    for number, piece in enumerate(pieces):
        is_first = number == 0
        after_special = not is_first and _is_special(pieces[number - 1])
        if _is_special(piece):
            starts.append(False)
        elif start_mark is not None:
            starts.append(is_first or piece.startswith(start_mark) or after_special)
        elif has_end_marks:
            starts.append(is_first or after_special or pieces[number - 1].endswith("</w>"))
        else:
            starts.append(not piece.startswith("##"))
    return starts


def _is_special(piece: str) -> bool:
    """Whether a piece is a special token, such as <s> or [CLS]."""
    if _BYTE.fullmatch(piece) or piece in _UNKNOWN_PIECES:
        return False
    return len(piece) > 2 and (piece[0] + piece[-1]) in ("<>", "[]")


def _bare(piece: str) -> str:
    if piece in _UNKNOWN_PIECES:
        return _UNKNOWN
    if _is_special(piece) or _BYTE.fullmatch(piece):
        return ""
    for mark in (*_WORD_START_MARKS, "##", "</w>"):
        piece = piece.replace(mark, "")
    return "".join(piece.casefold().split())


# ---- for people to look at


def overlay(image: Image.Image, weights: Tensor) -> Image.Image:
    """Return the image, at its size, under its attention [h, w].

    Reddish where it is high, dark grey where it is low.
    """
    values = weights.float().cpu().numpy()
    spread = max(float(values.max() - values.min()), 1e-12)  # not 0 where attention is even
    values = (values - values.min()) / spread
    heat = Image.fromarray((values * 255).astype(numpy.uint8))
    heat = heat.resize(image.size, Image.Resampling.BICUBIC)
    share = numpy.asarray(heat, dtype=numpy.float32)[..., None] / 255

    pixels = numpy.asarray(image.convert("RGB"), dtype=numpy.float32)
    dark = pixels.mean(axis=-1, keepdims=True) * 0.35
    red = numpy.array([255.0, 60.0, 30.0], dtype=numpy.float32)
    bright = pixels * 0.65 + red * 0.35
    shown = dark * (1 - share) + bright * share
    return Image.fromarray(shown.clip(0, 255).astype(numpy.uint8))
