"""DALL-E mini in tiny, as min-dalle's files hold it, and min-dalle's own loop over it."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.peers.min_dalle import _package
from inference import SamplingParams, TextToImage
from tokenizer_image import VQGAN, VQGANConfig
from tokenizer_image.config import AS_RELEASED
from tokenizer_image.quantizer_config import QuantizerConfig

SIZES = {"embed_count": 32, "attention_head_count": 2, "glu_embed_count": 43, "layer_count": 2, "device": "cpu"}
TEXT_ROWS, IMAGE_ROWS = 400, 16391  # more image embeddings than codes, as mega has
UNSCALED = ("pre_self_attn_layer_norm", "pre_encoder_attn_layer_norm", "glu.ln0", "glu.ln1", "final_ln")
"""Norms before a matrix, of which Flax keeps no scale."""


@dataclass
class Peer:
    """min-dalle's own loop over one caption, with what its parts gave."""

    memory: Tensor
    """[2, T, D]; the caption's second."""
    logits: Tensor
    """[2, N, K]."""
    tokens: Tensor
    """[1, N] or its first so many, drawn with guidance 16, always the likeliest."""


def published_states() -> dict[str, dict[str, Tensor]]:
    """State dicts of the package's encoder and decoder as the published files hold them: float16, without some scales."""
    models = _package().models
    torch.manual_seed(0)
    parts = {"encoder": models.DalleBartEncoder(text_vocab_count=TEXT_ROWS, text_token_count=64, **SIZES),
             "decoder": models.DalleBartDecoder(image_vocab_count=IMAGE_ROWS, **SIZES)}
    return {side: published(module) for side, module in parts.items()}


def published(module: nn.Module) -> dict[str, Tensor]:
    for name, parameter in module.named_parameters():
        if "q_proj" in name or "embed_positions" in name:  # tokens differ from place to place
            parameter.data *= 4
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.weight.data = 1 + 0.3 * torch.randn(part.weight.shape)
            part.bias.data = 0.3 * torch.randn(part.bias.shape)
    return {name: tensor.half() for name, tensor in module.state_dict().items()
            if not any(name.endswith(f"{norm}.weight") for norm in UNSCALED)}


def shaken_norms(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.GroupNorm):
            part.weight.data = 1 + 0.3 * torch.randn(part.weight.shape)
            part.bias.data = 0.3 * torch.randn(part.bias.shape)
    return module.eval().requires_grad_(False)


def detokenizer(seed: int = 0) -> VQGAN:
    """16 x 16 codes of 16,384 and a pixel each: what stands for the VQGAN where its pictures do not matter."""
    torch.manual_seed(seed)
    return VQGAN(VQGANConfig(resolution=16, channels=32, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(),
                             mid_attention=False, z_channels=8, embed_dim=4, codebook_size=2**14, norm_eps=1e-5,
                             output_range="unit", has_encoder=False,
                             quantizer=QuantizerConfig(l2_normalize=False, **AS_RELEASED))).eval()


def run_peer(folder: Path, states: dict[str, dict[str, Tensor]], caption: str, begin: int | None = None,
             steps: int = 256) -> Peer:
    """min-dalle's generate_raw_image_stream with the files' weights, left after `steps` tokens (a multiple of 32); begin: a row
    to begin with instead of its 16383."""
    package = _package()
    from min_dalle.text_tokenizer import TextTokenizer

    loop = package.MinDalle.__new__(package.MinDalle)  # its __init__ downloads
    loop.device, loop.dtype, loop.is_reusable, loop.text_token_count = "cpu", torch.float32, True, 64
    loop.layer_count, loop.embed_count = SIZES["layer_count"], SIZES["embed_count"]
    loop.tokenizer = TextTokenizer(json.loads((folder / "vocab.json").read_text(encoding="utf8")),
                                   (folder / "merges.txt").read_text(encoding="utf8").split("\n")[1:-1])
    loop.encoder = package.models.DalleBartEncoder(text_vocab_count=TEXT_ROWS, text_token_count=64, **SIZES)
    loop.decoder = package.models.DalleBartDecoder(image_vocab_count=IMAGE_ROWS, **SIZES)
    memories, logits = [], []
    for side, part in (("encoder", loop.encoder), ("decoder", loop.decoder)):
        part.load_state_dict(states[side], strict=False)  # as its init_encoder
        part.eval().requires_grad_(False)
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

    loop.encoder.forward, loop.decoder.forward = encoder_forward, decoder_forward
    loop.image_grid_from_tokens = lambda image_tokens, **_: image_tokens
    with torch.no_grad():
        partly = loop.generate_raw_image_stream(caption, seed=1, grid_size=1, top_k=1, supercondition_factor=16,
                                                progressive_outputs=True)
        tokens = next(itertools.islice(partly, steps // 32 - 1, None))
        partly.close()
    return Peer(memories[0], torch.stack(logits, dim=1), tokens[:, :steps])


def assert_equal(model: TextToImage, peer: Peer, caption: str) -> None:
    """Memory, the logits of every step, and the tokens of a greedy guided picture."""
    source = model.text_tokenizer
    given = source.encode([caption])
    text, mask = (torch.cat(parts) for parts in zip(source.null_for(given), given, strict=True))
    with torch.no_grad():
        memory = model.seq2seq.encode_text(text, mask)
        logits = model.seq2seq.decode(memory, mask, peer.tokens[:, :-1].expand(2, -1)).image
    gaps = [float((memory - peer.memory)[mask].abs().max()), float((logits - peer.logits).abs().max())]
    print(f"equality: memory within {gaps[0]:.1e}, logits within {gaps[1]:.1e}")  # shown by pytest -rP
    assert max(gaps) < 1e-5
    assert peer.logits.std() > 0.3
    assert len(set(peer.tokens[0].tolist())) > 5
    drawn = model.sample_tokens(caption, params=SamplingParams(guidance_scale=16.0, temperature=0.0))
    assert torch.equal(drawn[:, : peer.tokens.shape[1]], peer.tokens)
    print(f"equality: guided tokens {peer.tokens.numel()} of {peer.tokens.numel()}")
