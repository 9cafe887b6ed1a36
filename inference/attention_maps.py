"""Which word painted which patch: the attention of each image token to each position of its caption.

Cross-attention (encoder-decoder) or the image slots' attention to the text slots (decoder-only), averaged over layers and
heads, as Hertz et al. 2022 (https://arxiv.org/abs/2208.01626) draw it for diffusion.
"""

# Axes: B pictures, H heads, n slots, N image tokens, T text positions, P prefix slots, h w code grid, d head width

from __future__ import annotations

from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor

from seq2seq import EncoderDecoder, ImageTransformer, TextBatch, TextSource
from seq2seq.layers import blinded, layer_blocks
from tokenloom_common.errors import UserError

_BEFORE_A_WORD = ("▁", "Ġ")  # SentencePiece, byte-level BPE; CLIP's BPE ends words in </w>, WordPiece goes on with ##


@torch.inference_mode()
def attention_to_text(model: ImageTransformer, text: TextBatch, image_tokens: Tensor, layout: Tensor | None = None) -> Tensor:
    """Weights [B, N, T] float32 of text positions for the slots that predict image_tokens [B, N], from one forward pass.

    Encoder-decoder: they sum to 1 over the real positions. Decoder-only: to what is left beside image and layout.
    """
    crosses = isinstance(model, EncoderDecoder)
    total = torch.zeros(())
    layers = layer_blocks(model.decoder, cross_attend=crosses)

    def record(attend: Any, args: tuple, kwargs: dict) -> None:
        nonlocal total
        query, key = args[0].float(), args[1].float()
        mask = kwargs.get("mask")
        total = total + (_cross_weights(query, key, mask) if crosses else _own_weights(attend, query, key, mask)).mean(dim=1)

    hooks = [blocks[1 if crosses else 0].block.attend.register_forward_pre_hook(record, with_kwargs=True) for blocks in layers]
    try:
        model(*text, image_tokens, layout)
    finally:
        for hook in hooks:
            hook.remove()
    first = model.prefix_slots - (0 if model.begin_of_image_slot else 1)
    weights = total[:, first: first + model.config.num_tokens] / len(layers)  # [B, N, keys]
    start = 0 if crosses else model.text_slots - model.config.text_length
    return weights[..., start: start + model.config.text_length]


def _cross_weights(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """[B, H, n, T]."""
    return _softmax(query, key, torch.ones(1, dtype=torch.bool, device=query.device) if mask is None else mask)


def _own_weights(attend: Any, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """[B, H, n, n] under a layer's own pattern."""
    pattern, slots = attend.pattern, query.shape[2]
    if attend.blind_slots:
        query, key = blinded(query, attend.blind_slots), blinded(key, attend.blind_slots)
    seen = pattern.mask(slots).to(query.device)
    if mask is not None:
        rest = torch.ones(*mask.shape[:-1], slots - mask.shape[-1], dtype=torch.bool, device=mask.device)
        seen = seen & torch.cat([mask, rest], dim=-1)
    return _softmax(query, key, seen)


def _softmax(query: Tensor, key: Tensor, seen: Tensor) -> Tensor:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # grouped-query attention
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)


def word_positions(source: TextSource, caption: str, word: str) -> list[int]:
    """Positions of a caption's text input that hold `word` (or several words in a row), each time that it occurs.

    UserError, with the caption's pieces, when it does not occur.
    """
    pieces = source.words(caption)
    bare, begins = [_bare(piece) for piece in pieces], _word_begins(pieces)
    wanted = "".join(word.casefold().split())
    found: set[int] = set()
    for first in [at for at, begin in enumerate(begins) if begin]:
        joined = ""
        for last in range(first, len(pieces)):
            if _is_special(pieces[last]):
                break
            joined += bare[last]
            ends = last + 1 == len(pieces) or begins[last + 1] or _is_special(pieces[last + 1])
            if joined == wanted and ends:
                found |= set(range(first, last + 1))
            if not wanted.startswith(joined):
                break
    if not wanted or not found:
        raise UserError(f"the caption '{caption}' has no word '{word}'; its pieces: {' '.join(filter(None, bare))}")
    return sorted(found)


def _word_begins(pieces: list[str]) -> list[bool]:
    """Which pieces begin a word: after a mark of the word before, or with one of its own, as the vocabulary writes them."""
    before = next((mark for mark in _BEFORE_A_WORD if any(mark in piece for piece in pieces)), None)
    begins = []
    for number, piece in enumerate(pieces):
        if _is_special(piece):
            begins.append(False)
        elif before is not None:
            begins.append(piece.startswith(before) or (number > 0 and _is_special(pieces[number - 1])))
        elif any(other.endswith("</w>") for other in pieces):
            begins.append(number == 0 or _is_special(pieces[number - 1]) or pieces[number - 1].endswith("</w>"))
        else:
            begins.append(not piece.startswith("##"))
    return begins


def _is_special(piece: str) -> bool:
    return len(piece) > 2 and (piece[0] + piece[-1]) in ("<>", "[]")


def _bare(piece: str) -> str:
    if _is_special(piece):
        return ""
    for mark in (*_BEFORE_A_WORD, "##", "</w>"):
        piece = piece.replace(mark, "")
    return "".join(piece.casefold().split())


def overlay(picture: Image.Image, weights: Tensor) -> Image.Image:
    """A picture under its attention [h, w]: bright where it is high, dark where it is low, on the picture's own size."""
    values = weights.float().cpu().numpy()
    values = (values - values.min()) / max(float(values.max() - values.min()), 1e-12)
    heat = Image.fromarray((values * 255).astype(numpy.uint8)).resize(picture.size, Image.Resampling.BICUBIC)
    share = numpy.asarray(heat, dtype=numpy.float32)[..., None] / 255
    pixels = numpy.asarray(picture.convert("RGB"), dtype=numpy.float32)
    gray = pixels.mean(axis=-1, keepdims=True) * 0.35
    red = numpy.array([255.0, 60.0, 30.0], dtype=numpy.float32)
    shown = gray * (1 - share) + (pixels * 0.65 + red * 0.35) * share
    return Image.fromarray(shown.clip(0, 255).astype(numpy.uint8))
