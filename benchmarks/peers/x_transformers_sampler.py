"""x-transformers as a sampler: its `TransformerWrapper` and `AutoregressiveWrapper.generate` with our weights.

Its layers are a copy of ours with x-transformers' own attention back in. It has no guidance; with it, work is its rows.
"""

# Axes: R rows, T text ids, s tokens drawn, N image tokens, K codebook size, D width

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
    """The version of x-transformers."""
    return importlib.metadata.version("x-transformers")


class XTransformersPeer:
    """Draws every row of some work on its own. cached: with its cache of keys and values, or each step from the beginning."""

    one_caption = False

    def __init__(self, model: EncoderDecoder, cached: bool = True) -> None:
        """ValueError for a model that x-transformers' wrapper cannot express."""
        self.model, self.cached = model, cached
        self.wrapper = _wrapper(model)

    def sample(self, work: Work) -> Tensor:
        """Tokens [R, s] in [0, K) of every row."""
        return self._generate(work, filter_logits_fn="top_k", filter_kwargs={"k": TOP_K})

    def greedy(self, work: Work) -> Tensor:
        """The likeliest tokens [R, s]."""
        return self._generate(work, temperature=0.0)

    def forced(self, work: Work, image_tokens: Tensor) -> Tensor:
        """Logits [R, s, K] before each of image_tokens [R, s], which its loop is made to draw."""
        seen: list[Tensor] = []

        def only(logits: Tensor) -> Tensor:
            wanted = image_tokens[:, len(seen), None]
            seen.append(logits.clone())
            return torch.full_like(logits, -torch.inf).scatter_(-1, wanted, 0.0)

        drawn = self._generate(work, filter_logits_fn=only)
        assert torch.equal(drawn, image_tokens)
        return torch.stack(seen, dim=1)

    @torch.no_grad()
    def _generate(self, work: Work, **options: Any) -> Tensor:
        text = work.row_text
        memory = self.model.encode_text(*text)  # [R, T, D]
        begin = torch.full((len(memory), 1), self.model.config.codebook_size, device=memory.device)
        return self.wrapper.generate(begin, work.tokens, context=memory, context_mask=text.text_mask, cache_kv=self.cached,
                                     **options)

    def verify(self, work: Work) -> dict[str, Any]:
        """Whether its loop has our logits, its likeliest tokens are ours, and what it draws are codes; in float32."""
        config, rows = self.model.config, len(work.row_text.text_mask)
        forced = random_tokens(work, rows, config.codebook_size)
        gap = relative_gap(forced_logits(self.model, work, forced), self.forced(work, forced))
        alone = work._replace(guidance=1.0)
        greedy = self.greedy(alone)
        equal = float((greedy == greedy_ids(self.model, alone)).double().mean())
        lost = shortfall(forced_logits(self.model, alone, greedy), greedy)
        return verdict(work, are_codes(self.sample(work), (rows, work.tokens), config.codebook_size), gap, lost, equal)


def _wrapper(model: EncoderDecoder) -> Any:
    config = model.config
    _check(config)
    wrapper: Any = TransformerWrapper(
        num_tokens=config.codebook_size + 1,  # the begin slot is a token here; the output has the codes alone
        max_seq_len=config.num_tokens, attn_layers=_layers(model), use_abs_pos_emb=config.learned_positions,
        to_logits=copy.deepcopy(model.to_logits))
    embedding = torch.cat([model.image_embedding.weight, model.begin_of_image[None]])
    wrapper.token_emb.emb.weight = _copied(embedding)
    positions = model.learned_image_positions()
    if positions is not None:
        wrapper.pos_emb.emb.weight = _copied(positions * config.width**0.5)  # x-transformers divides by the square root
    if model.embedding_norm is not None:
        wrapper.post_emb_norm = copy.deepcopy(model.embedding_norm)  # its own has no bias
    return AutoregressiveWrapper(wrapper).eval().requires_grad_(False)


def _check(config: Seq2SeqConfig) -> None:
    for applies, what in ((config.rotary == "2d", "rotary '2d'; use 1d or none"),
                          (set(config.patterns(config.decoder_layers)) != {"full"}, f"attention {config.attention}; use full"),
                          (config.layout_grid is not None, "a layout")):
        if applies:
            raise ValueError(f"x-transformers' wrapper cannot express {what}")


def _layers(model: EncoderDecoder) -> nn.Module:
    """A copy of our decoder with x-transformers' own attention: that of a new one of the same shape."""
    config = model.config
    rotary = config.rotary == "1d"
    plain: Any = Decoder(dim=config.width, depth=1, heads=config.heads, attn_dim_head=config.head_dim,
                         attn_kv_heads=config.kv_heads, attn_qk_rmsnorm=config.qk_norm, attn_flash=True, rotary_pos_emb=rotary,
                         rotary_emb_dim=config.head_dim, verbose=False)
    stack: Any = copy.deepcopy(model.decoder)
    for attention, *_ in layer_blocks(stack, cross_attend=True):
        attention.block.attend = copy.deepcopy(layer_blocks(plain, cross_attend=False)[0][0].block.attend)
    stack.rotary_pos_emb = plain.rotary_pos_emb
    return stack.to(model.to_logits.weight.device)


def _copied(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)
