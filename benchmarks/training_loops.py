"""Training loops compared by `python -m benchmarks training`: ours, plain PyTorch and x-transformers."""

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
from training.train_seq2seq import Seq2SeqTraining


class Options(NamedTuple):
    """What is measured; as JSON in the document."""

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
    """Of one run of ours in a run folder of its own."""
    return Seq2SeqRunConfig.parse({
        "run_dir": tempfile.mkdtemp(dir=folder), "data": {"path": str(folder / "tokens")},
        "image_tokenizer": str(folder / "tokenizer"), "text": {"vocab_size": 300, "text_length": 32}, "caption_dropout": 0.0,
        "model": {"preset": "debug", "width": options.width, "heads": options.width // 64, "head_dim": 64, "encoder_layers": 2,
                  "decoder_layers": options.layers, "rotary": "none", "image_positions": "flat"},
        "train": {"steps": options.steps, "batch_size": options.batch, "precision": options.dtype, "sample_every": 0,
                  "threads": options.threads},
        "optim": {"lr": 1e-3, "warmup_steps": 2}, "checkpoint": {"every_steps": 0}, "deepspeed": {"zero_stage": stage}},
        "benchmark")


class Run(NamedTuple):
    """Losses of every step, and seconds of every step but the first."""

    losses: list[float]
    seconds: list[float]


@contextlib.contextmanager
def moments_of_steps() -> Iterator[list[float]]:
    """The time after every step of our loop, noted where it tells its watchdog."""
    moments: list[float] = []
    beat = Watchdog.beat

    def noted(self: Watchdog, step: int) -> None:
        beat(self, step)
        moments.append(time.perf_counter())

    Watchdog.beat = noted  # type: ignore[method-assign]
    try:
        yield moments
    finally:
        Watchdog.beat = beat  # type: ignore[method-assign]


def _between(moments: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(moments)]


class Batches(NamedTuple):
    """A fresh model and all of a run's batches, as ours has them."""

    config: Seq2SeqRunConfig
    model: Any
    batches: list[Any]

    @classmethod
    def of(cls, folder: Path, options: Options, group: Processes) -> Batches:
        """Made by our own script, and taken out before DeepSpeed changes anything."""
        config = run_config(folder, options)
        training = Seq2SeqTraining(config, group)
        return cls(config, copy.deepcopy(training.model).float(), list(training.batches(0)))


def hand_written(given: Batches, group: Processes, peer: bool) -> Run:
    """A loop of ten lines: forward, backward, clip, step. peer: x-transformers' wrapper computes the loss."""
    config, device = given.config, group.device
    model = copy.deepcopy(given.model).to(device).train()
    loss_of = _peer_loss(model) if peer else _loss(model)
    optimizer = build_optimizer(model, config.optim)
    losses, moments = [], []
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
        harness.synchronize(device.type)
        moments.append(time.perf_counter())
    return Run([float(loss) for loss in losses], _between(moments))


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _loss(model: Any) -> Loss:
    return lambda text, mask, tokens: image_token_loss(model(text, mask, tokens).image, tokens)


def _peer_loss(model: Any) -> Loss:
    """AutoregressiveWrapper's own loss; its parameters are put into `model` in the place of ours, so that they are trained."""
    wrapper = XTransformersPeer(model).wrapper.requires_grad_(True).train()
    net = wrapper.net
    del model.image_embedding, model.begin_of_image, model.decoder, model.to_logits
    for name in [name for name, _ in model.named_parameters() if not name.startswith("text_encoder.")]:
        delattr(model, name)
    model.peer = net
    longer = model.config.num_tokens + 1  # its wrapper works on the last token too, whose output it drops
    places = net.pos_emb.emb.weight.detach()
    net.pos_emb.emb.weight = torch.nn.Parameter(torch.cat([places, places[-1:]]))
    net.max_seq_len = net.pos_emb.max_seq_len = longer
    begin = model.config.codebook_size

    def loss(text: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        sequence = torch.nn.functional.pad(tokens, (1, 0), value=begin)
        return wrapper(sequence, context=model.encode_text(text, mask), context_mask=mask)

    return loss
