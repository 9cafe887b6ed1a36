"""min-dalle as a sampler: its `MinDalle.generate_raw_image_stream` with the weights of a model of ours of DALL-E mini's shape.

The package's own encoder, decoder and token loop run; of `MinDalle` only what reads its published files, the text tokenizer
and the picture decoder is left out. It always draws with guidance, and all pictures of a call are of one caption.
Its loop fixes 256 tokens of a codebook of 16,384 and captions of 64 ids; it can be left after every 32 tokens.
"""

# Axes: B pictures, R = 2B rows, T text ids, s = N image tokens, K codebook size, D width, I inner width of the feed-forward

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.attention import relative_gap
from benchmarks.decode.reference import (
    PAD_ID,
    TOP_K,
    Work,
    are_codes,
    forced_logits,
    greedy_ids,
    guided,
    random_tokens,
    shortfall,
    verdict,
)
from seq2seq import EncoderDecoder
from seq2seq.layers import layer_blocks

EVERY = 32  # tokens
SHAPE: dict[str, Any] = {
    "text_length": 64, "codebook_size": 2**14, "grid": (16, 16), "feedforward": "geglu", "feedforward_bias": False,
    "attention_bias": False, "norm": "layernorm", "norm_placement": "normformer", "embedding_norm": True, "qk_norm": False,
    "rotary": "none", "learned_positions": True, "image_positions": "flat", "attention": ("full",), "last_attention": None,
    "layout_grid": None}
"""Fields of our config that the package's code fixes; preset dalle-mini has them."""


def peer_version() -> str:
    """The version of min-dalle. ImportError where it, or what it needs, cannot be imported."""
    _package()
    return importlib.metadata.version("min-dalle")


class MinDallePeer:
    """Draws N tokens of B pictures of one caption, with guidance."""

    one_caption = True

    def __init__(self, model: EncoderDecoder) -> None:
        """ImportError without min-dalle; ValueError for a model of another shape, or one that begins with another vector."""
        _check(model)
        self.model, config = model, model.config
        weight = model.to_logits.weight
        package = _package()
        sizes: dict[str, Any] = {
            "attention_head_count": config.heads, "embed_count": config.width,
            "glu_embed_count": int(config.width * config.feedforward_multiplier), "device": str(weight.device)}
        loop = package.MinDalle.__new__(package.MinDalle)  # its __init__ downloads
        loop.device, loop.dtype, loop.is_reusable = str(weight.device), weight.dtype, True
        loop.text_token_count, loop.embed_count, loop.layer_count = config.text_length, config.width, config.decoder_layers
        loop.tokenizer = _Ids()
        loop.encoder = package.models.DalleBartEncoder(
            layer_count=config.encoder_layers, text_token_count=config.text_length, text_vocab_count=config.text_vocab_size,
            **sizes)
        loop.decoder = package.models.DalleBartDecoder(
            image_vocab_count=config.codebook_size, layer_count=config.decoder_layers, **sizes)
        loop.image_grid_from_tokens = lambda image_tokens, **_: image_tokens  # the pictures are not drawn
        copy_encoder(model, loop.encoder)
        copy_decoder(model, loop.decoder)
        for part in (loop.encoder, loop.decoder):
            part.to(weight.device, weight.dtype).eval().requires_grad_(False)
        self.loop = loop

    def sample(self, work: Work, top_k: int = TOP_K) -> Tensor:
        """Tokens [B, s] in [0, K), s a multiple of 32: its loop shows what it has so often, and is left there. ValueError for
        work that its loop cannot do."""
        _check_work(work)
        ids, mask = (part[0] for part in work.captions)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.cuda.amp.autocast is deprecated, and says that there is no CUDA
            partly = self.loop.generate_raw_image_stream(
                ids[mask].tolist(), seed=0, grid_size=_Pictures(work.images), top_k=top_k, progressive_outputs=True,
                supercondition_factor=work.guidance)
            image_tokens = next(itertools.islice(partly, work.tokens // EVERY - 1, None))
            partly.close()
            return image_tokens[:, : work.tokens]

    def forced(self, work: Work, image_tokens: Tensor) -> Tensor:
        """Logits [R, N, K], the pictures' first, before each of image_tokens [B, N], which its loop is made to draw."""
        decoder, seen = self.loop.decoder, []

        def only(settings: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
            logits, state = decoder.forward(**inputs)
            unconditional, conditional = logits[:, -1, : 2**14].chunk(2)
            seen.append(torch.cat([conditional, unconditional]))
            return image_tokens[:, len(seen) - 1], state

        decoder.sample_tokens = only
        try:
            drawn = self.sample(work)
        finally:
            del decoder.sample_tokens
        assert torch.equal(drawn, image_tokens)
        return torch.stack(seen, dim=1)

    def verify(self, work: Work) -> dict[str, Any]:
        """Whether its loop has our logits, its likeliest tokens are ours, and what it draws are codes; in float32."""
        config = self.model.config
        forced = random_tokens(work, work.pictures, config.codebook_size)
        gap = relative_gap(forced_logits(self.model, work, forced.repeat(2, 1)), self.forced(work, forced))
        greedy = self.sample(work, top_k=1)
        equal = float((greedy == greedy_ids(self.model, work)).double().mean())
        lost = shortfall(guided(forced_logits(self.model, work, greedy.repeat(2, 1)), work.guidance), greedy)
        drawn = are_codes(self.sample(work), (work.pictures, work.tokens), config.codebook_size)
        return verdict(work, drawn, gap, lost, equal)


class _Ids:
    """In the place of the package's text tokenizer: the caption is a list of ids already."""

    def tokenize(self, text: list[int], is_verbose: bool = False) -> list[int]:
        return text


class _Pictures:
    """As `grid_size`, which the loop only squares: any number of pictures, not only 1, 4, 9."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __pow__(self, two: int) -> int:
        return self.count


def copy_encoder(model: EncoderDecoder, encoder: Any) -> None:
    """Our text encoder's weights into a `DalleBartEncoder`."""
    ours: Any = model.text_encoder
    _copy(encoder.embed_tokens, ours.text_input.embedding.weight)
    _copy(encoder.embed_positions, ours.text_input.position)
    _copy_norm(encoder.layernorm_embedding, ours.embedding_norm)
    for layer, (attention, feedforward) in zip(encoder.layers, layer_blocks(ours.layers, cross_attend=False), strict=True):
        _copy_attention(layer.self_attn, layer.pre_self_attn_layer_norm, layer.self_attn_layer_norm, attention)
        _copy_feedforward(layer.glu, feedforward)
    _copy_norm(encoder.final_ln, ours.layers.final_norm)


def copy_decoder(model: EncoderDecoder, decoder: Any) -> None:
    """Our decoder's weights into a `DalleBartDecoder`. Its last entry, which its loop neither reads nor draws, begins too."""
    _copy(decoder.embed_tokens, torch.cat([model.image_embedding.weight, model.begin_of_image[None]]))
    _copy(decoder.embed_positions, model.learned_image_positions())
    _copy_norm(decoder.layernorm_embedding, model.embedding_norm)
    for layer, (attention, cross, feedforward) in zip(decoder.layers, layer_blocks(model.decoder, cross_attend=True),
                                                      strict=True):
        _copy_attention(layer.self_attn, layer.pre_self_attn_layer_norm, layer.self_attn_layer_norm, attention)
        _copy_attention(layer.encoder_attn, layer.pre_encoder_attn_layer_norm, layer.encoder_attn_layer_norm, cross)
        _copy_feedforward(layer.glu, feedforward)
    _copy_norm(decoder.final_ln, model.decoder.final_norm)
    weight = model.to_logits.weight
    _copy(decoder.lm_head, torch.cat([weight, torch.zeros_like(weight[:1])]))


def _copy_attention(theirs: Any, norm: nn.LayerNorm, norm_after: nn.LayerNorm, ours: Any) -> None:
    _copy_norm(norm, ours.norm)
    _copy_norm(norm_after, ours.norm_after)
    for part in ("q", "k", "v", "out"):
        _copy(getattr(theirs, f"{part}_proj"), getattr(ours.block, f"to_{part}").weight)


def _copy_feedforward(theirs: Any, ours: Any) -> None:
    gated, norm, _, out = ours.block.ff
    value, gate = gated.proj.weight.chunk(2)  # [2 I, D] -> [I, D] each; the gate goes through the GELU
    _copy_norm(theirs.ln0, ours.norm)
    _copy_norm(theirs.ln1, norm)
    for layer, weight in ((theirs.fc0, gate), (theirs.fc1, value), (theirs.fc2, out.weight)):
        _copy(layer, weight)


@torch.no_grad()
def _copy_norm(theirs: nn.LayerNorm, ours: Any) -> None:
    """x-transformers' LayerNorm has `gamma`, to which it may add 1, and no bias."""
    plain = isinstance(ours, nn.LayerNorm)
    theirs.weight.copy_(ours.weight if plain else ours.gamma + float(ours.unit_offset))
    theirs.bias.copy_(ours.bias if plain and ours.bias is not None else torch.zeros_like(theirs.bias))


@torch.no_grad()
def _copy(theirs: Any, weight: Tensor | None) -> None:
    assert weight is not None and theirs.weight.shape == weight.shape
    theirs.weight.copy_(weight)


def _check(model: EncoderDecoder) -> None:
    config, weight = model.config, model.to_logits.weight
    for field, value in SHAPE.items():
        if getattr(config, field) != value:
            raise ValueError(f"min-dalle has {field} {value}, the model has {getattr(config, field)}")
    if config.norm_eps not in (None, 1e-5):
        raise ValueError(f"min-dalle has norm_eps 1e-5, the model has {config.norm_eps}")
    if config.heads * config.head_dim != config.width or config.kv_heads not in (None, config.heads):
        raise ValueError(f"min-dalle's heads share its width: {config.heads} heads of {config.head_dim}, width {config.width}, "
                         f"kv_heads {config.kv_heads}")
    if config.encoder_layers == 0 or config.text_vocab_size is None:
        raise ValueError("min-dalle reads text ids with an encoder of its own")
    if not torch.equal(model.image_embedding.weight[-1], model.begin_of_image):
        raise ValueError("min-dalle begins with the last code: give both the same vector (decode_reference.make_model does)")
    if weight.device.type == "cpu" and weight.dtype != torch.float32:
        raise ValueError(f"min-dalle runs in float32 on the CPU, the model is {weight.dtype}")


def _check_work(work: Work) -> None:
    if len(work.captions.text_mask) != 1 or work.guidance == 1 or work.tokens % EVERY:
        raise ValueError(f"min-dalle draws tokens of one caption with guidance, {EVERY} at a time; asked for {work.tokens} of "
                         f"{len(work.captions.text_mask)} captions with guidance {work.guidance}")
    caption, mask = (part[0] for part in work.captions)
    real = work.unguided.text_input[0][work.unguided.text_mask[0]]
    if not torch.equal(real, caption[mask][[0, -1]]):
        raise ValueError("min-dalle's unguided caption is the first and the last id of the caption")
    if not all(torch.equal(text.text_input != PAD_ID, text.text_mask) for text in (work.captions, work.unguided)):
        raise ValueError(f"min-dalle takes id {PAD_ID} and no other for padding")


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """The package's import sets threads, gradients and cuDNN for the whole process."""
    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    cudnn = (torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(gradients)
        torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32 = cudnn


def _package() -> Any:
    with _as_before():
        import min_dalle
    return min_dalle
