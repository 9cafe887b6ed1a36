"""FLOPs of training, counted on the model itself.

A model is built without memory (torch's meta device) and run once; torch counts multiplications and
additions of its matrix products, attention and convolutions. Positions that a causal mask hides
count where they are multiplied all the same, as is usual (Chowdhery et al. 2022, appendix B,
https://arxiv.org/abs/2204.02311); row, column and convolutional attention count the blocks that
`seq2seq.attention.attend` multiplies.
"""

# Axes: B images (= 1), T text ids, F width of text features, N image tokens, L layout tokens,
#       S pixels of a side

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
    """FLOPs of a transformer's forward pass in training, over one image and its caption."""
    model = build_on_meta(TRANSFORMER_KINDS[config.kind], config)
    inputs = [*text_on_meta(config, 1), _ids(config.num_tokens)]
    if config.layout_grid:
        inputs.append(_ids(config.layout_tokens))
    return _count(model, *inputs)


@lru_cache(maxsize=32)
def tokenizer_forward_flops(config: ImageTokenizerConfig) -> int:
    """FLOPs of an image tokenizer's encoder, quantizer and decoder over one image.

    Discriminator and perceptual network are not counted.
    """
    model: ImageTokenizer = build_on_meta(build_tokenizer, config)  # in training mode
    for part in model.modules():
        # a codebook that learns reads values, and tensors on the meta device have none
        if isinstance(part, Quantizer) and part.config.kind != "gumbel":
            part.eval()
    return _count(model, _image(config.in_channels, config.resolution))


@lru_cache(maxsize=32)
def matcher_forward_flops(config: MatcherConfig) -> int:
    """FLOPs of one forward pass through both towers, over one image and its caption."""
    model = build_on_meta(Matcher, config)
    return _count(model, _image(3, config.image.resolution), *text_on_meta(config.text, 1))


def tokenizer_training_flops(config: TokenizerRunConfig) -> int:
    """FLOPs of forward and backward over one image in train_tokenizer.

    All that a step runs is counted, also the discriminator in both its uses and the perceptual
    network that compares images.
    """
    # activations that are computed again do not count (see training_flops)
    train = config.train.model_copy(update={"gradient_checkpointing": False})
    # FLOPs do not depend on the precision
    _, step = tokenizer_step(config.model_copy(update={"train": train}), 1, "float32")

    with _Counter() as counter, autocast_on_meta():
        step()
    return counter.flops


def _ids(count: int) -> Tensor:
    return torch.empty(1, count, dtype=torch.int64, device="meta")


def _image(channels: int, side: int) -> Tensor:
    return torch.empty(1, channels, side, side, device="meta")  # [B, C, S, S]


def _count(model: nn.Module, *inputs: Tensor) -> int:
    with _Counter() as counter, torch.no_grad(), autocast_on_meta():
        model(*inputs)
    return counter.flops


class _Counter(TorchDispatchMode):
    """Add up torch's FLOP formulas.

    torch's own FlopCounterMode also tracks modules, which torch.autograd.grad inside a step breaks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)  # None for all that is no product
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out
