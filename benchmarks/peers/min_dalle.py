"""min-dalle as a sampler: its token loop with our weights, for models of DALL-E mini's shape.

The package's own encoder, decoder and `MinDalle.generate_raw_image_stream` run; of `MinDalle` only
the reading of its published files, the text tokenizer and the image decoder are left out. It always
samples with guidance, and all images of a call are of one caption. Its loop fixes 256 tokens of a
codebook of 16,384 and captions of 64 ids; it can be left after every 32 tokens.
"""

# Axes: B images, R = 2B rows, T text ids, s = N image tokens, K codebook size, D width,
#       I inner width of the feed-forward

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

CHUNK = 32  # tokens between two places where its loop can be left
SHAPE: dict[str, Any] = {
    "text_length": 64, "codebook_size": 2**14, "grid": (16, 16), "feedforward": "geglu",
    "feedforward_bias": False, "attention_bias": False, "norm": "layernorm",
    "norm_placement": "normformer", "embedding_norm": True, "qk_norm": False, "rotary": "none",
    "learned_positions": True, "image_positions": "flat", "attention": ("full",),
    "last_attention": None, "layout_grid": None}
"""Fields of our config that the package's code fixes; preset dalle-mini has them."""


def peer_version() -> str:
    """Version of min-dalle. ImportError if it, or a package that it needs, cannot be imported."""
    _package()
    return importlib.metadata.version("min-dalle")


class MinDallePeer:
    """Samples N tokens of B images of one caption, with guidance."""

    one_caption = True

    def __init__(self, model: EncoderDecoder) -> None:
        """ImportError without min-dalle; ValueError for another shape or begin vector."""
        _check(model)
        self.model = model
        self.loop = _make_loop(model)
        copy_encoder(model, self.loop.encoder)
        copy_decoder(model, self.loop.decoder)
        weight = model.to_logits.weight
        for part in (self.loop.encoder, self.loop.decoder):
            part.to(weight.device, weight.dtype).eval().requires_grad_(False)

    def sample(self, work: Work, top_k: int = TOP_K) -> Tensor:
        """Sample tokens [B, s] in [0, K), s a multiple of 32. ValueError for other work."""
        _check_work(work)
        ids, mask = (part[0] for part in work.captions)
        with torch.no_grad(), warnings.catch_warnings():
            # torch.cuda.amp.autocast is deprecated, and says that there is no CUDA
            warnings.simplefilter("ignore")
            stream = self.loop.generate_raw_image_stream(
                ids[mask].tolist(), seed=0, grid_size=_ImageCount(work.images), top_k=top_k,
                progressive_outputs=True, supercondition_factor=work.guidance)
            # its loop yields every 32 tokens, and is left when it has enough
            image_tokens = next(itertools.islice(stream, work.tokens // CHUNK - 1, None))
            stream.close()
            return image_tokens[:, : work.tokens]

    def forced(self, work: Work, image_tokens: Tensor) -> Tensor:
        """Logits [R, N, K], conditional rows first, before each of image_tokens [B, N]."""
        decoder = self.loop.decoder
        seen: list[Tensor] = []

        def return_given(settings: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
            logits, state = decoder.forward(**inputs)
            unconditional, conditional = logits[:, -1, : 2**14].chunk(2)
            seen.append(torch.cat([conditional, unconditional]))
            return image_tokens[:, len(seen) - 1], state

        decoder.sample_tokens = return_given
        try:
            drawn = self.sample(work)
        finally:
            del decoder.sample_tokens
        assert torch.equal(drawn, image_tokens)
        return torch.stack(seen, dim=1)

    def verify(self, work: Work) -> dict[str, Any]:
        """Check that its logits and greedy tokens are ours, and that it samples codes."""
        codebook_size = self.model.config.codebook_size
        forced = random_tokens(work, work.pictures, codebook_size)
        expected = forced_logits(self.model, work, forced.repeat(2, 1))
        gap = relative_gap(expected, self.forced(work, forced))

        greedy = self.sample(work, top_k=1)
        equal = float((greedy == greedy_ids(self.model, work)).double().mean())
        logits = guided(forced_logits(self.model, work, greedy.repeat(2, 1)), work.guidance)
        lost = shortfall(logits, greedy)

        drawn_ok = are_codes(self.sample(work), (work.pictures, work.tokens), codebook_size)
        return verdict(work, drawn_ok, gap, lost, equal)


def _make_loop(model: EncoderDecoder) -> Any:
    """Build a `MinDalle` of the model's sizes, without text tokenizer and image decoder."""
    config = model.config
    weight = model.to_logits.weight
    package = _package()
    loop = package.MinDalle.__new__(package.MinDalle)  # its __init__ downloads
    loop.device = str(weight.device)
    loop.dtype = weight.dtype
    loop.is_reusable = True
    loop.text_token_count = config.text_length
    loop.embed_count = config.width
    loop.layer_count = config.decoder_layers
    loop.tokenizer = _Ids()

    sizes: dict[str, Any] = {
        "attention_head_count": config.heads, "embed_count": config.width,
        "glu_embed_count": int(config.width * config.feedforward_multiplier), "device": loop.device}
    loop.encoder = package.models.DalleBartEncoder(
        layer_count=config.encoder_layers, text_token_count=config.text_length,
        text_vocab_count=config.text_vocab_size, **sizes)
    loop.decoder = package.models.DalleBartDecoder(
        image_vocab_count=config.codebook_size, layer_count=config.decoder_layers, **sizes)
    loop.image_grid_from_tokens = lambda image_tokens, **_: image_tokens  # images are not decoded
    return loop


class _Ids:
    """Replaces the package's text tokenizer: the caption is a list of ids already."""

    def tokenize(self, text: list[int], is_verbose: bool = False) -> list[int]:
        return text


class _ImageCount:
    """Passed as `grid_size`, which is only squared: any number of images, not only 1, 4, 9."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __pow__(self, two: int) -> int:
        return self.count


def copy_encoder(model: EncoderDecoder, encoder: Any) -> None:
    """Copy our text encoder's weights into a `DalleBartEncoder`."""
    ours: Any = model.text_encoder
    _copy(encoder.embed_tokens, ours.text_input.embedding.weight)
    _copy(encoder.embed_positions, ours.text_input.position)
    _copy_norm(encoder.layernorm_embedding, ours.embedding_norm)
    our_layers = layer_blocks(ours.layers, cross_attend=False)
    for layer, (attention, feedforward) in zip(encoder.layers, our_layers, strict=True):
        _copy_attention(layer.self_attn, layer.pre_self_attn_layer_norm,
                        layer.self_attn_layer_norm, attention)
        _copy_feedforward(layer.glu, feedforward)
    _copy_norm(encoder.final_ln, ours.layers.final_norm)


def copy_decoder(model: EncoderDecoder, decoder: Any) -> None:
    """Copy our decoder's weights into a `DalleBartDecoder`.

    It has one more token, which its loop neither reads nor samples; the begin vector stands there
    too.
    """
    embedding = torch.cat([model.image_embedding.weight, model.begin_of_image[None]])
    _copy(decoder.embed_tokens, embedding)
    _copy(decoder.embed_positions, model.learned_image_positions())
    _copy_norm(decoder.layernorm_embedding, model.embedding_norm)
    our_layers = layer_blocks(model.decoder, cross_attend=True)
    for layer, (attention, cross, feedforward) in zip(decoder.layers, our_layers, strict=True):
        _copy_attention(layer.self_attn, layer.pre_self_attn_layer_norm,
                        layer.self_attn_layer_norm, attention)
        _copy_attention(layer.encoder_attn, layer.pre_encoder_attn_layer_norm,
                        layer.encoder_attn_layer_norm, cross)
        _copy_feedforward(layer.glu, feedforward)
    _copy_norm(decoder.final_ln, model.decoder.final_norm)
    weight = model.to_logits.weight
    _copy(decoder.lm_head, torch.cat([weight, torch.zeros_like(weight[:1])]))


def _copy_attention(target: Any, norm: nn.LayerNorm, norm_after: nn.LayerNorm, ours: Any) -> None:
    _copy_norm(norm, ours.norm)
    _copy_norm(norm_after, ours.norm_after)
    for part in ("q", "k", "v", "out"):
        _copy(getattr(target, f"{part}_proj"), getattr(ours.block, f"to_{part}").weight)


def _copy_feedforward(target: Any, ours: Any) -> None:
    gated, norm, _, out = ours.block.ff
    value, gate = gated.proj.weight.chunk(2)  # [I, D] each; the gate goes through the GELU
    _copy_norm(target.ln0, ours.norm)
    _copy_norm(target.ln1, norm)
    _copy(target.fc0, gate)
    _copy(target.fc1, value)
    _copy(target.fc2, out.weight)


@torch.no_grad()
def _copy_norm(target: nn.LayerNorm, ours: Any) -> None:
    """Copy PyTorch's LayerNorm, or x-transformers': no bias, `gamma` may be stored less 1."""
    if isinstance(ours, nn.LayerNorm):
        target.weight.copy_(ours.weight)
        target.bias.copy_(torch.zeros_like(target.bias) if ours.bias is None else ours.bias)
    else:
        target.weight.copy_(ours.gamma + float(ours.unit_offset))
        target.bias.zero_()


@torch.no_grad()
def _copy(target: Any, weight: Tensor | None) -> None:
    assert weight is not None and target.weight.shape == weight.shape
    target.weight.copy_(weight)


def _check(model: EncoderDecoder) -> None:
    """ValueError for a model that the package's code cannot be."""
    config = model.config
    weight = model.to_logits.weight
    for field, value in SHAPE.items():
        found = getattr(config, field)
        if found != value:
            raise ValueError(f"min-dalle has {field} {value}, the model has {found}")
    if config.norm_eps not in (None, 1e-5):
        raise ValueError(f"min-dalle has norm_eps 1e-5, the model has {config.norm_eps}")
    grouped = config.kv_heads not in (None, config.heads)
    if config.heads * config.head_dim != config.width or grouped:
        raise ValueError(f"min-dalle's heads share its width: {config.heads} heads of "
                         f"{config.head_dim}, width {config.width}, kv_heads {config.kv_heads}")
    if config.encoder_layers == 0 or config.text_vocab_size is None:
        raise ValueError("min-dalle reads text ids with an encoder of its own")
    if not torch.equal(model.image_embedding.weight[-1], model.begin_of_image):
        raise ValueError("min-dalle begins with the last code: give both the same vector "
                         "(benchmarks.decode.reference.make_model does)")
    if weight.device.type == "cpu" and weight.dtype != torch.float32:
        raise ValueError(f"min-dalle runs in float32 on the CPU, the model is {weight.dtype}")


def _check_work(work: Work) -> None:
    """ValueError for work that the package's loop cannot do."""
    captions = len(work.captions.text_mask)
    if captions != 1 or work.guidance == 1 or work.tokens % CHUNK:
        raise ValueError(f"min-dalle draws tokens of one caption with guidance, {CHUNK} at a time; "
                         f"asked for {work.tokens} of {captions} captions with guidance "
                         f"{work.guidance}")

    caption, mask = (part[0] for part in work.captions)
    unguided = work.unguided.text_input[0][work.unguided.text_mask[0]]
    if not torch.equal(unguided, caption[mask][[0, -1]]):
        raise ValueError("min-dalle's unguided caption is the first and the last id of the caption")
    for text in (work.captions, work.unguided):
        if not torch.equal(text.text_input != PAD_ID, text.text_mask):
            raise ValueError(f"min-dalle takes id {PAD_ID} and no other for padding")


@contextlib.contextmanager
def _unchanged_process() -> Iterator[None]:
    """Restore threads, gradients and cuDNN, which the package's import changes."""
    threads = torch.get_num_threads()
    gradients = torch.is_grad_enabled()
    cudnn = (torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(gradients)
        torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32 = cudnn


def _package() -> Any:
    with _unchanged_process():
        import min_dalle
    return min_dalle
