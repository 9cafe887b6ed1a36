"""transformers as a sampler: BART's `generate`, a decoder of our shape behind our text encoder.

Its weights are random: BART has a plain feed-forward and norms after its blocks. The feed-forward's
width makes a layer as large as ours. Guidance: `guidance_scale` adds a second forward per step that
never sees `encoder_outputs`, so it is of no use to an encoder-decoder; with guidance, work is its
rows.
"""

# Axes: R rows, T text ids, s tokens sampled, N image tokens, K codebook size, D width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.decode.reference import TOP_K, Work, are_codes, verdict
from benchmarks.harness import SEED
from seq2seq import EncoderDecoder
from seq2seq.config import Seq2SeqConfig

CACHES = ("dynamic", "static")
"""Equally fast on one CPU core: static / dynamic 1.06 for 1 row, 1.00 for 8 (width 256, 4
layers)."""


def peer_version() -> str:
    """Version of transformers. ImportError or RuntimeError if BART cannot be imported."""
    import transformers
    from transformers import BartForConditionalGeneration  # noqa: F401  (lazy: this may fail)

    return str(transformers.__version__)


class BartPeer:
    """Samples every row of the work on its own. cache: `dynamic` grows with it, `static` not.

    layer_parameters: number of parameters in its decoder layers; our_layer_parameters: in ours.
    """

    one_caption = False

    def __init__(self, model: EncoderDecoder, cache: str = "dynamic") -> None:
        """ImportError without transformers; ValueError for an unknown cache or a wrong width."""
        if cache not in CACHES:
            raise ValueError(f"cache '{cache}': expected one of {', '.join(CACHES)}")
        self.model = model
        self.cache = cache
        self.our_layer_parameters = sum(part.numel() for part in model.decoder.parameters())
        weight = model.to_logits.weight
        self.bart = _make_bart(model.config, self.our_layer_parameters)
        self.bart.to(weight.device, weight.dtype)
        layers = self.bart.get_decoder().layers
        self.layer_parameters = sum(part.numel() for part in layers.parameters())

    @torch.no_grad()
    def sample(self, work: Work) -> Tensor:
        """Sample tokens [R, s] in [0, K) of every row."""
        from transformers.modeling_outputs import BaseModelOutput

        text = work.row_text
        memory: Any = self.model.encode_text(*text)  # [R, T, D]
        options = {}
        if self.cache == "static":
            # allocated in full from the start; on CUDA it makes transformers compile the decoder
            options["cache_implementation"] = "static"
        ids = self.bart.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=memory),
            attention_mask=text.text_mask.long(), max_new_tokens=work.tokens, do_sample=True,
            top_k=TOP_K, temperature=1.0, num_beams=1, use_cache=True, **options)
        return ids[:, 1:]  # without the begin slot

    def verify(self, work: Work) -> dict[str, Any]:
        """Check that s codes per row come out; its weights differ, so nothing else compares."""
        shape = (len(work.row_text.text_mask), work.tokens)
        drawn_ok = are_codes(self.sample(work), shape, self.model.config.codebook_size)
        return verdict(work, drawn_ok, None, None, None)


def feedforward_width(config: Seq2SeqConfig, layer_parameters: int) -> int:
    """Feed-forward width for which a BART decoder layer has about so many parameters.

    Its two attentions have 4 D^2 + 4 D each, its three norms 6 D, its feed-forward 2 D + 1 per unit
    and D.
    """
    width = config.width
    attentions = 2 * (4 * width**2 + 4 * width)
    rest = attentions + 6 * width + width
    return max(1, round((layer_parameters - rest) / (2 * width + 1)))


def _make_bart(config: Seq2SeqConfig, our_parameters: int) -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    if config.width % config.heads:
        raise ValueError(f"BART's heads share its width: {config.heads} heads do not divide "
                         f"width {config.width}")
    config_class: Any = BartConfig  # its annotations do not know attn_implementation
    shape = config_class(
        vocab_size=config.codebook_size, d_model=config.width,
        max_position_embeddings=config.num_tokens + 1,
        encoder_layers=0, encoder_attention_heads=config.heads, encoder_ffn_dim=1,
        decoder_layers=config.decoder_layers, decoder_attention_heads=config.heads,
        decoder_ffn_dim=feedforward_width(config, our_parameters // config.decoder_layers),
        dropout=0.0, tie_word_embeddings=False, attn_implementation="sdpa",
        # any code begins, as in min-dalle; no id ends, so that s tokens are sampled
        decoder_start_token_id=0, bos_token_id=None, eos_token_id=None,
        forced_eos_token_id=None, pad_token_id=0)
    torch.manual_seed(SEED)
    return BartForConditionalGeneration(shape).eval().requires_grad_(False)
