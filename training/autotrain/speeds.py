"""Speeds of the shapes that are considered, each measured once and only when it is asked for."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch

from tokenloom_common.errors import UserError
from training.autotrain.choices import (
    Choices,
    Times,
    channels_of,
    row_batch,
    tokenizer_batch,
)
from training.autotrain.facts import DataFacts, MachineFacts
from training.autotrain.probe import ProbeWorkers
from training.autotrain.recipes import (
    STAND_INS,
    check_size_of,
    read_stage,
    tokenizer_values,
    transformer_values,
)
from training.autotrain.shapes import USUAL_WIDTH, Shape
from training.config.tokenizer import TokenizerRunConfig
from training.engine.deepspeed_json import deepspeed_json
from training.engine.launch import resolve_precision
from training.planning.fits import MemoryFit, MemoryOptions, least_memory
from training.planning.plan import tokenizer_plan

log = logging.getLogger(__name__)

LAUNCH = 3.0
"""Time until a script trains / time until a process has imported torch."""


class MeasuredSpeeds:
    """Speeds by a short real probe; the memory of a device by its estimate."""

    def __init__(self, workers: ProbeWorkers, data: DataFacts, machine: MachineFacts,
                 overrides: dict[str, list[str]]) -> None:
        self.workers, self.data, self.machine = workers, data, machine
        self.overrides = overrides
        self.start_seconds = LAUNCH * workers.import_seconds
        self._known: dict[tuple[Any, ...], float] = {}

    def picture(self, shape: Shape) -> float:
        """Seconds in which an image tokenizer of this shape learns from one image."""
        key = ("picture", shape)
        if key not in self._known:
            config = self._tokenizer_config(shape)
            step = self.workers.seconds_per_step("tokenizer", config.plain())
            self._known[key] = step / config.train.batch_size
            log.info("measured: %d px, %s tokens: %.0f images a second to train the tokenizer",
                     shape.size, shape.grid, 1 / self._known[key])
        return self._known[key]

    def row(self, shape: Shape, width: int) -> float:
        """Seconds in which a transformer learns from one row."""
        key = ("row", shape.tokens, width)
        if key not in self._known:
            # one that starts from a model has its shape, and nothing of it is loaded here
            choices = self._assumed(replace(shape, start_width=None), width)
            values = transformer_values(choices, code_tables=True, keep_best=False)
            config = self._read("transformer", values)
            side = shape.size // shape.patch
            derived = {"text_vocab_size": choices.vocabulary, "text_feature_width": None,
                       "text_length": choices.text_length, "codebook_size": choices.codebook_size,
                       "grid": (side, side), "tokenizer_fingerprint": "0" * 32}
            step = self.workers.seconds_per_step("transformer", config.plain(), derived)
            self._known[key] = step / config.train.batch_size
            log.info("measured: %d tokens, width %d: %.0f rows a second to train the transformer",
                     shape.tokens, width, 1 / self._known[key])
        return self._known[key]

    def fits(self, shape: Shape) -> bool:
        """Whether the memory of a device holds the training of this shape's tokenizer."""
        if self.machine.memory is None:
            return True
        config = self._tokenizer_config(shape)
        fit = MemoryFit(tokenizer_plan(config, config.train.precision), self.machine.processes,
                        self.machine.gpus > 0)
        options = MemoryOptions.of(config)
        memory = fit.memory(options)
        assert memory is not None, "a config that was read is possible"
        micro_batch = config.train.batch_size // self.machine.processes
        needed = least_memory(memory, fit.activations(micro_batch, options.checkpointing))
        return needed <= self.machine.memory

    def _tokenizer_config(self, shape: Shape) -> TokenizerRunConfig:
        values = tokenizer_values(self._assumed(shape, USUAL_WIDTH), self.machine)
        config = self._read("tokenizer", values)
        check_size_of(config, shape.size, "this data")
        return config

    def _read(self, stage: str, values: dict[str, Any]) -> Any:
        config = read_stage(stage, STAND_INS[stage], self.overrides, values)
        device = torch.device("cuda" if self.machine.gpus else "cpu")
        try:
            # refuses now a batch or a DeepSpeed file that the script would refuse when it starts
            deepspeed_json(config, self.machine.processes, resolve_precision(config, device),
                           parameters=1)
        except UserError as error:
            raise UserError(f"--{stage}.*: {error}") from None
        return config

    def _assumed(self, shape: Shape, width: int) -> Choices:
        """Choices of this shape before there are times: what is not yet chosen costs no time."""
        times = Times(0.0, 0.0, 1000.0, 0.0, 1000.0, 0.0, 0.05, 0.05)
        return Choices(
            shape=shape, codebook_size=shape.codebook_size or 1024,
            channels=channels_of(self.machine), tokenizer_batch=tokenizer_batch(self.machine),
            flip=0.0, width=width, dropout=0.0, batch=row_batch(self.machine),
            vocabulary=self.data.vocabulary, text_length=max(8, self.data.text_ids), guidance=2.0,
            temperature=1.0, top_k=64, copied=self.data.images, held_out=0,
            images=self.data.images, times=times)
