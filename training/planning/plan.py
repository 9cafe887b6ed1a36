"""The plan of a run: everything that its memory, arithmetic and disk depend on.

All of it follows from the run's config and a few sizes, without its data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from inference.memory.estimate import Workload
from inference.memory.estimate import estimate as sampling_memory
from inference.memory.meta_device import build_on_meta
from inference.scoring.matcher import Matcher, MatcherConfig
from seq2seq import TransformerConfig
from tokenizer_image import LPIPS, ImageTokenizerConfig, build_tokenizer
from tokenizer_image.discriminators import build_discriminator
from training.config.matcher import MatcherRunConfig
from training.config.run import RunConfig
from training.config.seq2seq import Seq2SeqRunConfig
from training.config.tokenizer import TokenizerRunConfig
from training.engine.gpus import training_flops
from training.objectives.matcher import MatcherWithTextHead
from training.planning.activations import (
    Activations,
    matcher_activations,
    tokenizer_activations,
    tokenizer_model,
    transformer_activations,
    transformer_model,
)
from training.planning.flops import (
    forward_flops,
    matcher_forward_flops,
    tokenizer_training_flops,
)
from training.planning.trained_module import FLOAT32_BYTES, TrainedModule

SAMPLE_PICTURES = 8  # of a sample grid


@dataclass(frozen=True)
class Plan:
    """A run: the modules that it trains, what else is in memory, and the cost of one image.

    other_models: bytes of models on the device that do not learn
    copy: bytes of the whole model in float32, as it is exported
    uses_copy: whether such a copy samples or measures on the device
    sampling: bytes that sampling takes beside that copy
    flops, tokens: of one image; flops of forward and backward, counted when called
    activations: (images of a micro-batch, gradient_checkpointing, on CUDA) -> its activations
    codebook_size: of the token shards that it learns from, 0 where it learns from images
    """

    config: RunConfig
    precision: str
    modules: tuple[TrainedModule, ...]
    other_models: int
    copy: int
    uses_copy: bool
    sampling: int
    flops: Callable[[], int]
    tokens: int
    activations: Callable[[int, bool, bool], Activations]
    codebook_size: int = 0

    @property
    def parameters(self) -> int:
        """Numbers of all that is trained."""
        return sum(module.trainable for module in self.modules)


def seq2seq_plan(config: Seq2SeqRunConfig, precision: str, model: TransformerConfig,
                 tokenizer: ImageTokenizerConfig | None = None) -> Plan:
    """Plan a run of train_seq2seq.py.

    Without an image tokenizer, neither it nor the decoding of samples is counted.
    """
    on_meta = transformer_model(model, precision, False)
    module = TrainedModule.of("model", on_meta, config.optim, precision)

    # samples are decoded during training, so the image tokenizer stays in memory
    tokenizer_bytes = 0
    if tokenizer is not None:
        tokenizer_bytes = _bytes(build_on_meta(build_tokenizer, tokenizer))
    sampling = 0
    if config.train.sample_every:
        # at scale 1 there is no unconditional half, so half as many rows
        workload = Workload(SAMPLE_PICTURES, SAMPLE_PICTURES, guided=config.sample_guidance != 1)
        sampling = sampling_memory(model, tokenizer, workload).beyond_weights

    def activations(count: int, recomputed: bool, cuda: bool) -> Activations:
        return transformer_activations(model, config.loss, count, precision, recomputed, cuda)

    return Plan(
        config, precision, (module,),
        other_models=tokenizer_bytes,
        copy=_copy_bytes(module),
        uses_copy=bool(config.train.sample_every or config.data.validation_split),
        sampling=sampling,
        # a lambda, since counting takes seconds and the check before a run needs memory alone
        flops=lambda: training_flops(forward_flops(model)),
        tokens=model.num_tokens,
        activations=activations,
        # images that are encoded on the fly leave no token shards on the disk
        codebook_size=0 if config.data.on_the_fly else model.codebook_size)


def matcher_plan(config: MatcherRunConfig, precision: str, model: MatcherConfig) -> Plan:
    """Plan a run of train_matcher.py."""
    on_meta = build_on_meta(
        lambda options: MatcherWithTextHead(Matcher(options), config.loss), model)
    module = TrainedModule.of("model", on_meta, config.optim, precision)

    def activations(count: int, recomputed: bool, cuda: bool) -> Activations:
        return matcher_activations(model, config.loss, count, precision, recomputed, cuda)

    return Plan(
        config, precision, (module,),
        other_models=0,
        copy=_copy_bytes(module),
        uses_copy=bool(config.data.validation_split),
        sampling=0,
        flops=lambda: training_flops(matcher_forward_flops(model)),
        tokens=0,
        activations=activations)


def tokenizer_plan(config: TokenizerRunConfig, precision: str) -> Plan:
    """Plan a run of train_tokenizer.py."""
    on_meta = tokenizer_model(config, precision)
    modules = [TrainedModule.of("model", on_meta, config.optim, precision)]
    if config.adversarial.weight:
        options, model = config.adversarial.discriminator, config.model
        with torch.device("meta"):
            adversary = build_discriminator(options, model.resolution, model.in_channels)
        # trained in float32, whatever the precision of the tokenizer
        modules.append(TrainedModule.of("discriminator", adversary, config.discriminator_optim,
                                        "float32"))

    perceptual_bytes = 0
    if config.loss.perceptual_weight:
        network: Any = config.loss.perceptual_network
        perceptual_bytes = _bytes(build_on_meta(LPIPS, network))

    def activations(count: int, recomputed: bool, cuda: bool) -> Activations:
        # its trace reads gradient_checkpointing from the config, and is the same on CUDA
        train = config.train.model_copy(update={"gradient_checkpointing": recomputed})
        return tokenizer_activations(config.model_copy(update={"train": train}), count, precision)

    return Plan(
        config, precision, tuple(modules),
        other_models=perceptual_bytes,
        copy=_copy_bytes(modules[0]),
        uses_copy=bool(config.data.validation_split),
        sampling=0,
        flops=lambda: tokenizer_training_flops(config),
        tokens=config.model.num_tokens,
        activations=activations)


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _copy_bytes(module: TrainedModule) -> int:
    # frozen parameters and buffers are in `fixed` as they are
    return FLOAT32_BYTES * module.trainable + module.fixed


def plan_of(config: RunConfig, precision: str, model: Any = None,
            tokenizer: ImageTokenizerConfig | None = None) -> Plan:
    """Plan a run of any training script.

    model, tokenizer: configs that do not follow from the run's config alone; see the plans above.
    """
    if isinstance(config, TokenizerRunConfig):
        return tokenizer_plan(config, precision)
    if isinstance(config, MatcherRunConfig):
        return matcher_plan(config, precision, model)
    assert isinstance(config, Seq2SeqRunConfig), type(config).__name__
    return seq2seq_plan(config, precision, model, tokenizer)
