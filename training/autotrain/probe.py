"""Measure the speed of this machine: a few real training steps, in as many processes as train.

    python -m training.autotrain.probe    # a worker: JSON lines in, JSON lines out
"""

# Axes: B batch, S pixels of a side, T text ids, N image tokens

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from seq2seq import TRANSFORMER_KINDS
from tokenizer_image import LPIPS, build_tokenizer
from tokenloom_common.errors import RunFailedError
from training.autotrain.launching import SCRIPTS
from training.autotrain.recipes import STAGES
from training.config.seq2seq import Seq2SeqRunConfig
from training.config.tokenizer import TokenizerRunConfig
from training.engine.optim import build_optimizer
from training.objectives.seq2seq import seq2seq_loss
from training.objectives.tokenizer import TokenizerObjective

LEAST_STEPS, MOST_STEPS = 2, 12
ENOUGH_SECONDS = 2.5
WARM_SECONDS, MOST_WARM_STEPS = 0.5, 3
BESIDE_THE_STEP = {"tokenizer": 1.25, "transformer": 1.05}
"""Time of a script's step / time of the bare one: loader, averages of weights and gradients.

Measured in CPU seconds at 32 px; the share is less where steps are longer.
"""


class ProbeWorkers:
    """Processes that measure together, as the processes of a training run work together."""

    def __init__(self, processes: int) -> None:
        started = time.perf_counter()
        paths = [str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, "-m", "training.autotrain.probe"]
        self._workers = [
            # a session of its own: Ctrl-C is for this process, whose end closes their stdin
            subprocess.Popen([*command, str(rank), str(processes)], env=environment, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
            for rank in range(processes)]
        self._ask_all({"stage": "none"})
        self.import_seconds = time.perf_counter() - started
        """From the start of the processes until all were ready."""

    def __enter__(self) -> ProbeWorkers:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            assert worker.stdin is not None
            worker.stdin.close()  # which ends it
            worker.wait()

    def seconds_per_step(self, stage: str, config: dict[str, Any],
                         derived: dict[str, Any] | None = None) -> float:
        """Measure a step of a stage's merged config; derived: of a transformer's tokenizers.

        RunFailedError where a step fails, as without memory.
        """
        answers = self._ask_all({"stage": stage, "config": config, "derived": derived or {}})
        for answer in answers:
            if "error" in answer:
                raise RunFailedError(f"measuring a training step failed: {answer['error']}")
        return BESIDE_THE_STEP[stage] * max(answer["seconds"] for answer in answers)

    def _ask_all(self, question: dict[str, Any]) -> list[dict[str, Any]]:
        for worker in self._workers:  # all first, so that they measure at the same time
            assert worker.stdin is not None
            worker.stdin.write(json.dumps(question) + "\n")
            worker.stdin.flush()
        answers = []
        for worker in self._workers:
            assert worker.stdout is not None
            line = worker.stdout.readline()
            if not line:
                raise RunFailedError("a process that measures the speed of training ended early")
            answers.append(json.loads(line))
        return answers


# ---- a worker

def main() -> int:
    """Answer each question on stdin by the seconds of a step."""
    rank, processes = int(sys.argv[1]), int(sys.argv[2])
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
    torch.set_float32_matmul_precision("high")  # as training does
    for line in sys.stdin:
        question = json.loads(line)
        answer: dict[str, Any]
        try:
            answer = {"seconds": _measure(question, device, processes)}
        except (RuntimeError, ValueError) as error:
            answer = {"error": " ".join(str(error).split())[:300]}
        print(json.dumps(answer), flush=True)
    return 0


def _measure(question: dict[str, Any], device: torch.device, processes: int) -> float:
    stage = question["stage"]
    if stage not in STAGES:
        return 0.0
    config = STAGES[stage].parse(question["config"], "config")
    if isinstance(config, TokenizerRunConfig):
        step = _tokenizer_step(config, device, processes)
    else:
        assert isinstance(config, Seq2SeqRunConfig)
        step = _transformer_step(config, question["derived"], device, processes)
    return _seconds_of(step, device)


def _tokenizer_step(config: TokenizerRunConfig, device: torch.device,
                    processes: int) -> Callable[[], None]:
    tokenizer = build_tokenizer(config.model).train().to(device)
    loss, perceptual = config.loss, None
    if loss.perceptual_weight:
        perceptual = LPIPS.load(loss.perceptual_network, loss.perceptual_path).to(device)
    objective = TokenizerObjective(loss, perceptual, None)
    optimizer = build_optimizer(tokenizer, config.optim)
    side = config.model.resolution
    count = max(1, config.train.batch_size // processes)
    image = torch.rand(count, 3, side, side, device=device) * 2 - 1
    image = image.to(memory_format=torch.channels_last)

    def step() -> None:
        tokenizer.set_step(0, config.train.steps)
        result = tokenizer(image)
        total, _ = objective(result, image, tokenizer.last_layer, 0)
        _learn(total, tokenizer, optimizer)

    return step


def _transformer_step(config: Seq2SeqRunConfig, derived: dict[str, Any], device: torch.device,
                      processes: int) -> Callable[[], None]:
    # here: it imports the token shards' readers, which the tokenizer's step does not need
    from seq2seq import TextBatch
    from training.data.visits.tokens import TokenBatch

    model_config = config.model.build({**derived, "grid": tuple(derived["grid"])})
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = TRANSFORMER_KINDS[model_config.kind](model_config).to(device, dtype)
    optimizer = build_optimizer(model, config.optim)
    count = max(1, config.train.batch_size // (processes * config.train.accumulation))
    vocabulary: int = derived["text_vocab_size"]
    text_ids = torch.randint(vocabulary, (count, model_config.text_length))
    text = TextBatch(text_ids.to(device), torch.ones_like(text_ids, dtype=torch.bool).to(device))
    shape = (count, model_config.num_tokens)
    tokens = torch.randint(model_config.codebook_size, shape, device=device)
    batch = TokenBatch(text, tokens, tokens)

    def step() -> None:
        for _ in range(config.train.accumulation):
            total, _ = seq2seq_loss(model, model, config.loss, batch)
            _learn(total, model, optimizer)

    return step


def _learn(total: torch.Tensor, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    total.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _seconds_of(step: Callable[[], None], device: torch.device) -> float:
    """Mean seconds of a step, after the first ones, which allocate and choose algorithms."""
    started = time.perf_counter()
    for warm_steps in range(1, MOST_WARM_STEPS + 1):
        step()
        _synchronize(device)
        warm_seconds = time.perf_counter() - started
        if warm_seconds >= ENOUGH_SECONDS:  # beside such a step, allocations are nothing
            return warm_seconds / warm_steps
        if warm_seconds >= WARM_SECONDS:
            break
    started = time.perf_counter()
    for count in range(1, MOST_STEPS + 1):
        step()
        _synchronize(device)
        seconds = time.perf_counter() - started
        if count >= LEAST_STEPS and seconds >= ENOUGH_SECONDS:
            break
    return seconds / count


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
