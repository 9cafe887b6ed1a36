"""How much arithmetic training takes, counted on the model itself, and how much a GPU can do at best.

A model is built without memory (torch's meta device) and run once; torch counts multiplications and additions of its matrix
products, attention and convolutions. What a causal mask hides counts where it is multiplied all the same, as is usual
(Chowdhery et al. 2022, appendix B, https://arxiv.org/abs/2204.02311); row, column and convolutional attention count the blocks
that `seq2seq.attention.attend` multiplies.
"""

# Axes: B pictures (= 1), T text ids, F width of text features, N image tokens, L layout tokens, S pixels of a side

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from inference.memory.meta_device import autocast_on_meta, build_on_meta
from inference.scoring.matcher import Matcher, MatcherConfig
from seq2seq import TRANSFORMER_KINDS, TransformerConfig
from tokenizer_image import ImageTokenizer, ImageTokenizerConfig, build_tokenizer
from tokenizer_image.quantizers import Quantizer
from training.config.tokenizer import TokenizerRunConfig
from training.planning.activations import text_on_meta, tokenizer_step


@lru_cache(maxsize=32)
def forward_flops(config: TransformerConfig) -> int:
    """Of a training step's forward over one picture and its caption, in either family of transformers."""
    model = build_on_meta(TRANSFORMER_KINDS[config.kind], config)
    layout = [_ids(config.layout_tokens)] if config.layout_grid else []
    return _counted(model, *text_on_meta(config, 1), _ids(config.num_tokens), *layout)


@lru_cache(maxsize=32)
def tokenizer_forward_flops(config: ImageTokenizerConfig) -> int:
    """Of an image tokenizer's encoder, quantizer and decoder over one picture; without discriminator and perceptual network."""
    model: ImageTokenizer = build_on_meta(build_tokenizer, config)
    for part in model.modules():  # a codebook that learns looks at its numbers, and there are none
        if isinstance(part, Quantizer) and part.config.kind != "gumbel":
            part.eval()
    return _counted(model, torch.empty(1, config.in_channels, config.resolution, config.resolution, device="meta"))


@lru_cache(maxsize=32)
def matcher_forward_flops(config: MatcherConfig) -> int:
    """Of both towers over one picture and its caption."""
    side = config.image.resolution
    return _counted(build_on_meta(Matcher, config), torch.empty(1, 3, side, side, device="meta"), *text_on_meta(config.text, 1))


def tokenizer_training_flops(config: TokenizerRunConfig) -> int:
    """Of forward and backward over one picture in train_tokenizer, with all that a step runs: discriminator (in both its parts)
    and perceptual network."""
    train = config.train.model_copy(update={"gradient_checkpointing": False})
    _, step = tokenizer_step(config.model_copy(update={"train": train}), 1, "float32")
    with _Counter() as counter, autocast_on_meta():
        step()
    return counter.flops


def _ids(count: int) -> Tensor:
    return torch.empty(1, count, dtype=torch.int64, device="meta")


def _counted(model: nn.Module, *inputs: Tensor) -> int:
    with _Counter() as counter, torch.no_grad(), autocast_on_meta():
        model(*inputs)
    return counter.flops


class _Counter(TorchDispatchMode):
    """torch's formulas alone: its FlopCounterMode also notes modules, which torch.autograd.grad inside a step does not bear."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


