"""What a training is going to do, as far as memory, arithmetic and disk depend on it: from its config, without its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
from training.engine.deepspeed_json import deepspeed_json
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
from training.planning.flops import forward_flops, matcher_forward_flops, tokenizer_training_flops
from training.planning.rank_memory import (
    LOW_PRECISION,
    NUMBER_BYTES,
    PROCESS,
    EngineMemory,
    Layout,
    Moment,
    TrainedModule,
    engine_memory,
)

NO_ACTIVATIONS = Activations(((0, 0),))
SAMPLE_PICTURES = 8


@dataclass(frozen=True)
class Plan:
    """A training: what it trains, what else is in memory, and what a picture takes.

    beside: bytes of other models on the device; copy: bytes of the whole model in float32, as it is exported; used: whether
    such a copy samples or measures on the device; sampled: bytes of that beside it; flops, tokens: of one picture, forward and
    backward.
    """

    config: RunConfig
    precision: str
    modules: tuple[TrainedModule, ...]
    beside: int
    copy: int
    used: bool
    sampled: int
    flops: Callable[[], int]
    tokens: int
    activations: Callable[[int, bool, bool], Activations]
    """Pictures of a micro-batch, gradient_checkpointing, on CUDA -> its activations."""
    codebook_size: int = 0
    """Of the token shards that it learns from, 0 where it learns from pictures."""

    @property
    def parameters(self) -> int:
        """Numbers of all that is trained."""
        return sum(module.trainable for module in self.modules)


@dataclass(frozen=True)
class RankMemory:
    """Bytes of the process that needs most, in its worst moment: the parts sum up to `total`, all of it on the device.

    host: main memory that this process needs beside (on a CPU that is the device, and this is part of `buffers`).
    """

    stage: int
    parameters: int
    optimizer: int
    gradients: int
    average: int
    activations: int
    buffers: int
    other_models: int
    process: int
    host: int
    moment: str
    certain: int
    """What no moment is without: parameters, optimizer, average, other models, and gradients at their fewest."""

    @property
    def total(self) -> int:
        """All bytes on the device."""
        return (self.parameters + self.optimizer + self.gradients + self.average + self.activations + self.buffers
                + self.other_models + self.process)


def seq2seq_plan(config: Seq2SeqRunConfig, precision: str, model: TransformerConfig,
                 tokenizer: ImageTokenizerConfig | None = None) -> Plan:
    """Of train_seq2seq.py; without an image tokenizer, it and the decoding of samples are not counted."""
    made = transformer_model(model, precision, False)
    module = TrainedModule.of("model", made, config.optim, precision)
    work = Workload(SAMPLE_PICTURES, SAMPLE_PICTURES, guided=config.sample_guidance != 1)
    sampled = sampling_memory(model, tokenizer, work).beyond_weights if config.train.sample_every else 0
    used = bool(config.train.sample_every or config.data.validation_split)
    return Plan(config, precision, (module,), 0 if tokenizer is None else _bytes(build_on_meta(build_tokenizer, tokenizer)),
                4 * module.trainable + module.fixed, used, sampled,
                lambda: training_flops(forward_flops(model)), model.num_tokens,
                lambda count, recomputed, cuda: transformer_activations(model, config.loss, count, precision, recomputed, cuda),
                0 if config.data.on_the_fly else model.codebook_size)


def matcher_plan(config: MatcherRunConfig, precision: str, model: MatcherConfig) -> Plan:
    """Of train_matcher.py."""
    made = build_on_meta(lambda options: MatcherWithTextHead(Matcher(options), config.loss), model)
    module = TrainedModule.of("model", made, config.optim, precision)
    return Plan(config, precision, (module,), 0, 4 * module.trainable + module.fixed, bool(config.data.validation_split), 0,
                lambda: training_flops(matcher_forward_flops(model)), 0,
                lambda count, recomputed, cuda: matcher_activations(model, config.loss, count, precision, recomputed, cuda))


def tokenizer_plan(config: TokenizerRunConfig, precision: str) -> Plan:
    """Of train_tokenizer.py."""
    model = tokenizer_model(config, precision)
    modules = [TrainedModule.of("model", model, config.optim, precision)]
    if config.adversarial.weight:
        with torch.device("meta"):
            adversary = build_discriminator(config.adversarial.discriminator, config.model.resolution, config.model.in_channels)
        modules.append(TrainedModule.of("discriminator", adversary, config.discriminator_optim, "float32"))
    beside = _bytes(build_on_meta(LPIPS, config.loss.perceptual_network)) if config.loss.perceptual_weight else 0  # type: ignore[arg-type]

    def activations(count: int, recomputed: bool, cuda: bool) -> Activations:
        train = config.train.model_copy(update={"gradient_checkpointing": recomputed})
        return tokenizer_activations(config.model_copy(update={"train": train}), count, precision)

    return Plan(config, precision, tuple(modules), beside, 4 * modules[0].trainable + modules[0].fixed,
                bool(config.data.validation_split), 0, lambda: tokenizer_training_flops(config), config.model.num_tokens,
                activations)


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def layout_of(plan: Plan, stage: int, processes: int, cuda: bool) -> Layout:
    """The plan's own layout at another stage, for `processes`. UserError for a batch that they cannot divide."""
    config = plan.config
    deepspeed = config.deepspeed.model_copy(update={"zero_stage": stage})
    json = deepspeed_json(config.model_copy(update={"deepspeed": deepspeed}), processes, plan.precision, plan.parameters)
    least = {"none": 0, "optimizer": 1, "parameters": 3}[config.deepspeed.offload]
    offload = config.deepspeed.offload if stage >= least else "none"
    return Layout(stage, processes, config.train.accumulation, offload, cuda, dict(json["zero_optimization"]))


def rank_memory(plan: Plan, layout: Layout, activations: Activations) -> RankMemory:
    """Memory of the first process, which has the moving average and the samples too."""
    engines = [engine_memory(module, layout, activations if number == 0 else NO_ACTIVATIONS)
               for number, module in enumerate(plan.modules)]
    average = plan.copy if plan.config.train.weight_ema else 0
    host = sum(engine.offloaded for engine in engines) + 2 * plan.copy
    copies = Moment("samples and export", 0, 0, plan.copy + plan.sampled if plan.used else 0)
    if not layout.cuda:
        copies = Moment("samples and export", 0, 0, max(2 * plan.copy, plan.copy + plan.sampled))
        host = sum(engine.offloaded for engine in engines)
    moments = [*(moment for engine in engines for moment in engine.moments), copies]
    worst = max(moments, key=lambda moment: moment.total)
    kept = _sum(engines)
    buffers = worst.buffers + kept.buffers + (0 if layout.cuda else kept.offloaded)
    number = NUMBER_BYTES[plan.precision]
    fewest = number * plan.parameters // (layout.processes if layout.stage > 1 else 1) if layout.offload == "none" else 0
    certain = kept.parameters + kept.optimizer + average + plan.beside + fewest + (0 if layout.cuda else kept.offloaded)
    return RankMemory(layout.stage, kept.parameters, kept.optimizer, worst.gradients + kept.gradients, average,
                      worst.activations, buffers, plan.beside, _process(plan, layout), host, worst.name, certain)


def _process(plan: Plan, layout: Layout) -> int:
    low = LOW_PRECISION if plan.precision != "float32" and not layout.cuda else 0
    return PROCESS["cuda" if layout.cuda else "cpu"][layout.stage] + low


def _sum(engines: list[EngineMemory]) -> EngineMemory:
    total = EngineMemory(0, 0, 0, 0, 0, ())
    for engine in engines:
        total = replace(total, **{name: getattr(total, name) + getattr(engine, name)
                                  for name in ("parameters", "optimizer", "gradients", "buffers", "offloaded")})
    return total


def checkpoint_bytes(plan: Plan, stage: int) -> int:
    """Of one checkpoint: DeepSpeed's files of all processes, and the moving average."""
    total = plan.copy if plan.config.train.weight_ema else 0
    for module in plan.modules:
        alone = engine_memory(module, Layout(0, 1, 1), NO_ACTIVATIONS)
        copies = 4 * module.trainable if stage and module.precision == "float32" else 0  # stages 1 to 3 have float32 twice
        weights = NUMBER_BYTES[module.precision] * module.trainable if stage == 3 else 0  # of which stage 3 writes one
        total += alone.parameters + alone.optimizer + copies - weights
    return total


def plan_of(config: RunConfig, precision: str, **shape: Any) -> Plan:
    """The plan of any of the three trainings; `shape`: what does not follow from the config alone."""
    if isinstance(config, TokenizerRunConfig):
        return tokenizer_plan(config, precision)
    if isinstance(config, MatcherRunConfig):
        return matcher_plan(config, precision, **shape)
    assert isinstance(config, Seq2SeqRunConfig), type(config).__name__
    return seq2seq_plan(config, precision, **shape)
