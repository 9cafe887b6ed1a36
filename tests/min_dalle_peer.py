"""A tiny DALL-E mini in the format of min-dalle's files, and min-dalle's own loop over it."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.min_dalle import _package
from inference import SamplingParams, TextToImage
from tokenizer_image import VQGAN, VQGANConfig
from tokenizer_image.config import AS_RELEASED
from tokenizer_image.quantizer_config import QuantizerConfig

SIZES = {"embed_count": 32, "attention_head_count": 2, "glu_embed_count": 43, "layer_count": 2,
         "device": "cpu"}
TEXT_TOKENS = 64
TEXT_ROWS, IMAGE_ROWS = 400, 16391  # more image embeddings than codes, as mega has
UNSCALED = ("pre_self_attn_layer_norm", "pre_encoder_attn_layer_norm", "glu.ln0", "glu.ln1",
            "final_ln")
"""Norms before a matrix, whose scale Flax does not keep."""


@dataclass
class Peer:
    """Results of min-dalle's own loop over one caption."""

    memory: Tensor
    """[2, T, D]; the second row is the caption's."""
    logits: Tensor
    """[2, N, K]."""
    tokens: Tensor
    """[1, N], or only the first ones: greedy, with guidance 16."""


def published_states() -> dict[str, dict[str, Tensor]]:
    """State dicts as the published files hold them: in float16, without some scales."""
    torch.manual_seed(0)
    encoder, decoder = make_parts()
    return {"encoder": published(encoder), "decoder": published(decoder)}


def make_parts() -> tuple[nn.Module, nn.Module]:
    """The package's encoder and decoder in tiny, randomly initialised."""
    models = _package().models
    encoder = models.DalleBartEncoder(
        text_vocab_count=TEXT_ROWS, text_token_count=TEXT_TOKENS, **SIZES)
    decoder = models.DalleBartDecoder(image_vocab_count=IMAGE_ROWS, **SIZES)
    return encoder, decoder


def published(module: nn.Module) -> dict[str, Tensor]:
    """Make a module's weights tell tokens apart; return the state dict that would be published."""
    for name, parameter in module.named_parameters():
        if "q_proj" in name or "embed_positions" in name:  # so that positions differ
            parameter.data *= 4
    shake(module, nn.LayerNorm)
    state = {}
    for name, tensor in module.state_dict().items():
        if not name.endswith(tuple(f"{norm}.weight" for norm in UNSCALED)):
            state[name] = tensor.half()
    return state


def shaken_norms(module: nn.Module) -> nn.Module:
    """Give group norms random scales and biases, so that swapped ones show."""
    shake(module, nn.GroupNorm)
    return module.eval().requires_grad_(False)


def shake(module: nn.Module, kind: type[nn.LayerNorm] | type[nn.GroupNorm]) -> None:
    for part in module.modules():
        if isinstance(part, kind):
            part.weight.data = 1 + 0.3 * torch.randn(part.weight.shape)
            part.bias.data = 0.3 * torch.randn(part.bias.shape)


def detokenizer(seed: int = 0) -> VQGAN:
    """A decoder of 16 x 16 codes to one pixel each, for tests in which images do not matter."""
    torch.manual_seed(seed)
    config = VQGANConfig(
        resolution=16, channels=32, channel_multipliers=(1,), num_res_blocks=1,
        attention_resolutions=(), mid_attention=False, z_channels=8, embed_dim=4,
        codebook_size=2**14, norm_eps=1e-5,
        output_range="unit", has_encoder=False,
        quantizer=QuantizerConfig(l2_normalize=False, **AS_RELEASED))
    return VQGAN(config).eval()


def run_peer(folder: Path, states: dict[str, dict[str, Tensor]], caption: str,
             begin: int | None = None, steps: int = 256) -> Peer:
    """Run min-dalle's own loop with the files' weights, and leave it after `steps` tokens.

    steps: a multiple of 32. begin: a row of the embedding to begin with instead of its 16383.
    """
    loop = make_loop(folder, states)
    memories: list[Tensor] = []
    logits: list[Tensor] = []
    encode, decode = loop.encoder.forward, loop.decoder.forward

    def encoder_forward(text_tokens):
        memories.append(encode(text_tokens))
        return memories[-1]

    def decoder_forward(**inputs):
        if begin is not None and not logits:
            inputs["prev_tokens"] = torch.full_like(inputs["prev_tokens"], begin)
        found, state = decode(**inputs)
        logits.append(found[:, -1, : 2**14])
        return found, state

    loop.encoder.forward = encoder_forward
    loop.decoder.forward = decoder_forward
    with torch.no_grad():
        stream = loop.generate_raw_image_stream(
            caption, seed=1, grid_size=1, top_k=1, supercondition_factor=16,
            progressive_outputs=True)
        tokens = next(itertools.islice(stream, steps // 32 - 1, None))  # it yields every 32 tokens
        stream.close()
    return Peer(memories[0], torch.stack(logits, dim=1), tokens[:, :steps])


def make_loop(folder: Path, states: dict[str, dict[str, Tensor]]) -> Any:
    """A `MinDalle` with the folder's vocabulary and these weights, without its image decoder."""
    package = _package()
    from min_dalle.text_tokenizer import TextTokenizer

    loop = package.MinDalle.__new__(package.MinDalle)  # its __init__ downloads
    loop.device = "cpu"
    loop.dtype = torch.float32
    loop.is_reusable = True
    loop.text_token_count = TEXT_TOKENS
    loop.layer_count = SIZES["layer_count"]
    loop.embed_count = SIZES["embed_count"]

    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf8"))
    merges = (folder / "merges.txt").read_text(encoding="utf8").split("\n")[1:-1]
    loop.tokenizer = TextTokenizer(vocabulary, merges)
    loop.encoder, loop.decoder = make_parts()
    for side, part in (("encoder", loop.encoder), ("decoder", loop.decoder)):
        part.load_state_dict(states[side], strict=False)  # as its init_encoder
        part.eval().requires_grad_(False)
    loop.image_grid_from_tokens = lambda image_tokens, **_: image_tokens
    return loop


def assert_equal(model: TextToImage, peer: Peer, caption: str) -> None:
    """Compare memory, the logits of every step, and the tokens of a greedy guided image."""
    source = model.text_tokenizer
    given = source.encode([caption])
    text, mask = (torch.cat(parts) for parts in zip(source.null_for(given), given, strict=True))
    with torch.no_grad():
        memory = model.seq2seq.encode_text(text, mask)
        logits = model.seq2seq.decode(memory, mask, peer.tokens[:, :-1].expand(2, -1)).image

    memory_gap = float((memory - peer.memory)[mask].abs().max())
    logits_gap = float((logits - peer.logits).abs().max())
    # shown by pytest -rP
    print(f"equality: memory within {memory_gap:.1e}, logits within {logits_gap:.1e}")
    assert max(memory_gap, logits_gap) < 1e-5
    assert peer.logits.std() > 0.3
    assert len(set(peer.tokens[0].tolist())) > 5

    params = SamplingParams(guidance_scale=16.0, temperature=0.0)
    drawn = model.sample_tokens(caption, params=params)
    assert torch.equal(drawn[:, : peer.tokens.shape[1]], peer.tokens)
    print(f"equality: guided tokens {peer.tokens.numel()} of {peer.tokens.numel()}")
