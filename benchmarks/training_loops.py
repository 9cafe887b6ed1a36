"""Loops compared by `python -m benchmarks training`: ours, plain PyTorch and x-transformers."""

from __future__ import annotations

import contextlib
import copy
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.peers.x_transformers_sampler import XTransformersPeer
from seq2seq.losses import image_token_loss
from training.config.seq2seq import Seq2SeqRunConfig
from training.engine.optim import build_optimizer, lr_at
from training.engine.processes import Processes
from training.engine.watchdog import Watchdog
from training.loop.loop import run_training
from training.train_seq2seq import Seq2SeqTraining

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""text ids [B, T], text_mask [B, T], image tokens [B, N] -> scalar."""


class Options(NamedTuple):
    """Sizes and settings that are measured; also the document's `options`."""

    quick: bool
    width: int
    layers: int
    grid: int
    batch: int
    steps: int
    stages: list[int]
    repeats: int
    device: str
    dtype: str
    threads: int


def run_config(folder: Path, options: Options, stage: int = 0) -> Seq2SeqRunConfig:
    """Return the config of one run of ours, in a new run folder."""
    # positions in one table: x-transformers' wrapper has no 2d rotary and no row and column tables
    model = {"preset": "debug", "width": options.width, "heads": options.width // 64,
             "head_dim": 64, "encoder_layers": 2, "decoder_layers": options.layers,
             "rotary": "none", "image_positions": "flat"}
    train = {"steps": options.steps, "batch_size": options.batch, "precision": options.dtype,
             "sample_every": 0, "threads": options.threads}
    values = {
        "run_dir": tempfile.mkdtemp(dir=folder), "data": {"path": str(folder / "tokens")},
        "image_tokenizer": str(folder / "tokenizer"), "model": model, "train": train,
        "text": {"vocab_size": 300, "text_length": 32}, "caption_dropout": 0.0,
        "optim": {"lr": 1e-3, "warmup_steps": 2}, "checkpoint": {"every_steps": 0},
        "deepspeed": {"zero_stage": stage}}
    return Seq2SeqRunConfig.parse(values, "benchmark")


class Run(NamedTuple):
    """Losses of every step, and seconds of every step but the first."""

    losses: list[float]
    seconds: list[float]


@contextlib.contextmanager
def step_times() -> Iterator[list[float]]:
    """Collect the time after every step of our loop, which tells its watchdog of each."""
    times: list[float] = []
    # the loop has no hook for it; a patch leaves the measured code as it is
    beat = Watchdog.beat

    def beat_and_keep(self: Watchdog, step: int) -> None:
        beat(self, step)
        times.append(time.perf_counter())

    Watchdog.beat = beat_and_keep  # type: ignore[method-assign]
    try:
        yield times
    finally:
        Watchdog.beat = beat  # type: ignore[method-assign]


def _durations(times: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


def ours(folder: Path, options: Options, group: Processes, stage: int = 0) -> Run:
    """Run `run_training` as the script does; its final save comes after the last step's time."""
    config = run_config(folder, options, stage)
    training = Seq2SeqTraining(config, group)
    task = training.task()
    train, losses = task.train, []

    def train_and_keep(batch: Any, step: int) -> dict[str, Tensor]:
        terms = train(batch, step)
        losses.append(terms["loss"])
        return terms

    task.train = train_and_keep
    with step_times() as times:
        run_training(task, config, group, training.run_state)
    # read only now: a loss read in the loop would wait for the device
    return Run([float(loss) for loss in losses], _durations(times))


class Batches(NamedTuple):
    """A fresh model and all batches of a run, as ours has them."""

    config: Seq2SeqRunConfig
    model: Any
    batches: list[Any]

    @classmethod
    def of(cls, folder: Path, options: Options, group: Processes) -> Batches:
        """Make them by our own script; copied before DeepSpeed changes anything."""
        config = run_config(folder, options)
        training = Seq2SeqTraining(config, group)
        return cls(config, copy.deepcopy(training.model).float(), list(training.batches(0)))


def hand_written(given: Batches, group: Processes, peer: bool) -> Run:
    """Run a loop of ten lines: forward, backward, clip, step.

    peer: x-transformers' wrapper computes the loss.
    """
    config, device = given.config, group.device
    model = copy.deepcopy(given.model).to(device).train()  # each round starts from the same weights
    loss_of = _peer_loss(model) if peer else _loss(model)
    optimizer = build_optimizer(model, config.optim)
    losses, times = [], []
    for step, batch in enumerate(given.batches):
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr_at(step, config.train.steps, config.optim)
        text, mask, tokens = (part.to(device) for part in (*batch.text, batch.image_tokens))
        loss = loss_of(text, mask, tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.gradient_clipping)
        optimizer.step()
        losses.append(loss.detach())
        harness.synchronize(device.type)  # a step's time ends when the device is done with it
        times.append(time.perf_counter())
    return Run([float(loss) for loss in losses], _durations(times))


def _loss(model: Any) -> Loss:
    return lambda text, mask, tokens: image_token_loss(model(text, mask, tokens).image, tokens)


def _peer_loss(model: Any) -> Loss:
    """AutoregressiveWrapper's own loss.

    The wrapper's network replaces ours inside `model`, so that one optimizer trains it and
    the text encoder.
    """
    wrapper = XTransformersPeer(model).wrapper.requires_grad_(True).train()
    net = wrapper.net
    del model.image_embedding, model.begin_of_image, model.decoder, model.to_logits
    # the rest is our position table, which net.pos_emb replaces
    left = [name for name, _ in model.named_parameters() if not name.startswith("text_encoder.")]
    for name in left:
        delattr(model, name)
    model.peer = net

    # the wrapper feeds the last token too and drops its output: it needs one position more
    positions = net.pos_emb.emb.weight.detach()
    net.pos_emb.emb.weight = torch.nn.Parameter(torch.cat([positions, positions[-1:]]))
    net.max_seq_len = net.pos_emb.max_seq_len = model.config.num_tokens + 1
    begin = model.config.codebook_size  # the id of begin of image in the wrapper's embedding

    def loss(text: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        sequence = torch.nn.functional.pad(tokens, (1, 0), value=begin)
        return wrapper(sequence, context=model.encode_text(text, mask), context_mask=mask)

    return loss
