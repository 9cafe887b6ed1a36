"""x-transformers as a sampler: its `AutoregressiveWrapper.generate` with our weights.

Its layers are a copy of ours with x-transformers' own attention back in. It has no guidance; with
guidance, work is its rows.
"""

# Axes: R rows, T text ids, s tokens sampled, N image tokens, K codebook size, D width

from __future__ import annotations

import copy
import importlib.metadata
from typing import Any

import torch
from torch import Tensor, nn
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

from benchmarks.attention import relative_gap
from benchmarks.decode.reference import (
    TOP_K,
    Work,
    are_codes,
    forced_logits,
    greedy_ids,
    random_tokens,
    shortfall,
    verdict,
)
from seq2seq import EncoderDecoder
from seq2seq.config import Seq2SeqConfig
from seq2seq.layers import layer_blocks


def peer_version() -> str:
    """Version of x-transformers."""
    return importlib.metadata.version("x-transformers")


class XTransformersPeer:
    """Samples every row of the work on its own. cached: with its KV cache, or without any."""

    one_caption = False

    def __init__(self, model: EncoderDecoder, cached: bool = True) -> None:
        """ValueError for a model that x-transformers' wrapper cannot express."""
        self.model = model
        self.cached = cached
        self.wrapper = _make_wrapper(model)

    def sample(self, work: Work) -> Tensor:
        """Sample tokens [R, s] in [0, K) of every row."""
        return self._generate(work, filter_logits_fn="top_k", filter_kwargs={"k": TOP_K})

    def greedy(self, work: Work) -> Tensor:
        """Most likely tokens [R, s]."""
        return self._generate(work, temperature=0.0)

    def forced(self, work: Work, image_tokens: Tensor) -> Tensor:
        """Logits [R, s, K] before each of image_tokens [R, s], which its loop is made to sample."""
        seen: list[Tensor] = []

        def allow_only_given(logits: Tensor) -> Tensor:
            token = image_tokens[:, len(seen), None]
            seen.append(logits.clone())
            return torch.full_like(logits, -torch.inf).scatter_(-1, token, 0.0)

        drawn = self._generate(work, filter_logits_fn=allow_only_given)
        assert torch.equal(drawn, image_tokens)
        return torch.stack(seen, dim=1)

    @torch.no_grad()
    def _generate(self, work: Work, **options: Any) -> Tensor:
        text = work.row_text
        memory = self.model.encode_text(*text)  # [R, T, D]
        begin = torch.full((len(memory), 1), self.model.config.codebook_size, device=memory.device)
        return self.wrapper.generate(
            begin, work.tokens, context=memory, context_mask=text.text_mask,
            cache_kv=self.cached, **options)

    def verify(self, work: Work) -> dict[str, Any]:
        """Check that its logits and greedy tokens are ours, and that it samples codes."""
        codebook_size = self.model.config.codebook_size
        rows = len(work.row_text.text_mask)
        forced = random_tokens(work, rows, codebook_size)
        gap = relative_gap(forced_logits(self.model, work, forced), self.forced(work, forced))

        conditional = work._replace(guidance=1.0)  # its loop cannot guide
        greedy = self.greedy(conditional)
        equal = float((greedy == greedy_ids(self.model, conditional)).double().mean())
        lost = shortfall(forced_logits(self.model, conditional, greedy), greedy)

        drawn_ok = are_codes(self.sample(work), (rows, work.tokens), codebook_size)
        return verdict(work, drawn_ok, gap, lost, equal)


def _make_wrapper(model: EncoderDecoder) -> Any:
    config = model.config
    _check(config)
    wrapper: Any = TransformerWrapper(
        num_tokens=config.codebook_size + 1,  # the begin slot is a token here, but not an output
        max_seq_len=config.num_tokens, attn_layers=_make_layers(model),
        use_abs_pos_emb=config.learned_positions, to_logits=copy.deepcopy(model.to_logits))

    embedding = torch.cat([model.image_embedding.weight, model.begin_of_image[None]])
    wrapper.token_emb.emb.weight = _copy(embedding)
    positions = model.learned_image_positions()
    if positions is not None:
        # x-transformers multiplies positions by 1 / sqrt(D)
        wrapper.pos_emb.emb.weight = _copy(positions * config.width**0.5)
    if model.embedding_norm is not None:
        wrapper.post_emb_norm = copy.deepcopy(model.embedding_norm)  # its own has no bias
    return AutoregressiveWrapper(wrapper).eval().requires_grad_(False)


def _check(config: Seq2SeqConfig) -> None:
    """ValueError for a model that x-transformers' wrapper cannot express."""
    found = None
    if config.rotary == "2d":
        found = "rotary '2d'; use 1d or none"
    elif set(config.patterns(config.decoder_layers)) != {"full"}:
        found = f"attention {config.attention}; use full"
    elif config.layout_grid is not None:
        found = "a layout"
    if found is not None:
        raise ValueError(f"x-transformers' wrapper cannot express {found}")


def _make_layers(model: EncoderDecoder) -> nn.Module:
    """Copy our decoder, with the attention of a plain x-transformers decoder of the same shape."""
    config = model.config
    plain: Any = Decoder(
        dim=config.width, depth=1, heads=config.heads, attn_dim_head=config.head_dim,
        attn_kv_heads=config.kv_heads, attn_qk_rmsnorm=config.qk_norm, attn_flash=True,
        rotary_pos_emb=config.rotary == "1d", rotary_emb_dim=config.head_dim, verbose=False)
    plain_attention = layer_blocks(plain, cross_attend=False)[0][0].block.attend

    stack: Any = copy.deepcopy(model.decoder)
    for attention, *_ in layer_blocks(stack, cross_attend=True):
        attention.block.attend = copy.deepcopy(plain_attention)
    stack.rotary_pos_emb = plain.rotary_pos_emb
    return stack.to(model.to_logits.weight.device)


def _copy(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)
