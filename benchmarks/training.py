"""A training step: ours, with everything a run does, beside hand-written loops in plain PyTorch and x-transformers.

    python -m benchmarks training --quick                               (a minute on one core)
    python -m benchmarks training --threads 2 --json training.json      (CPU, a step of about half a second)
    python -m benchmarks training --stages 0,1,2,3                      (one process: what sharding costs without shards)

Ours is `training/train_seq2seq.py`'s own loop: token shards, DeepSpeed, log lines, watchdog. `plain` is the same model, AdamW,
schedule and clipping on the same batches, collated before the clock starts, in ten lines. `x-transformers` is its
AutoregressiveWrapper over the same decoder with its own attention. Nothing is compared before their losses have been seen to be
equal: of every step in plain PyTorch, of the first in x-transformers, which keeps positions at another scale. A round trains
each for the same steps, in turns; the time of a step is the median of the steps but the first.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import SEED, Case
from benchmarks.training_loops import (
    Batches,
    Options,
    Run,
    _between,
    hand_written,
    moments_of_steps,
    run_config,
)
from tokenizer_image import VQGAN, VQGANConfig
from tokenizer_image.fingerprint import code_fingerprint
from tokenloom_common.errors import UserError
from training.data.tokens.shards import SplitIndex, TokenIndex, write_index, write_shard
from training.engine.launch import processes
from training.engine.processes import Processes
from training.engine.stopping import STARTED_ALONE
from training.engine.universal import LAUNCHERS_NAMES
from training.loop.loop import run_training
from training.train_seq2seq import Seq2SeqTraining

TOLERANCE = 2e-4
"""Largest difference of two loops' losses, as a share; float32 sums in another order come to 1e-6."""
WORDS = ("red", "green", "blue", "large", "small", "heart", "circle", "square", "apple", "cat", "above", "a")


def make_data(folder: Path, options: Options) -> None:
    """`tokenizer` and `tokens`: random codes with random captions, enough for every step to have its own."""
    torch.manual_seed(SEED)
    side = options.grid * 4
    tokenizer = VQGAN(VQGANConfig(resolution=side, channels=8, channel_multipliers=(1, 1, 1), num_res_blocks=1, norm_groups=4,
                                  attention_resolutions=(), mid_attention=False, z_channels=8, embed_dim=4, codebook_size=1024))
    tokenizer.eval().save_pretrained(folder / "tokenizer")
    (folder / "tokens").mkdir()
    generator, rows = numpy.random.default_rng(SEED), options.batch * options.steps
    tokens = generator.integers(0, 1024, (rows, options.grid**2)).astype(numpy.uint16)
    captions = [[" ".join(generator.choice(WORDS, 6))] for _ in range(rows)]
    file = write_shard(folder / "tokens/train-00000-of-00001.arrow", captions, tokens, [f"k{row}" for row in range(rows)])
    write_index(folder / "tokens", TokenIndex(
        tokenizer_fingerprint=code_fingerprint(tokenizer), codebook_size=1024, grid=(options.grid, options.grid),
        splits={"train": SplitIndex(rows=rows, files=[file])}))


def ours(folder: Path, options: Options, group: Processes, stage: int = 0) -> Run:
    """`run_training` as the script calls it; what it saves at the end comes after the last step."""
    config = run_config(folder, options, stage)
    training = Seq2SeqTraining(config, group)
    task, losses = training.task(), []
    train = task.train

    def kept(batch: Any, step: int) -> dict[str, Tensor]:
        terms = train(batch, step)
        losses.append(terms["loss"])
        return terms

    task.train = kept
    with moments_of_steps() as moments:
        run_training(task, config, group, training.run_state)
    return Run([float(loss) for loss in losses], _between(moments))


def measure(options: Options) -> dict[str, Any]:
    """The document."""
    with tempfile.TemporaryDirectory() as name, processes(options.threads) as group:
        folder = Path(name)
        make_data(folder, options)
        given = Batches.of(folder, options, group)
        loops: dict[str, Callable[[], Run]] = {
            "ours": lambda: ours(folder, options, group), "plain": lambda: hand_written(given, group, peer=False),
            "x-transformers": lambda: hand_written(given, group, peer=True)}
        first = {name: loop() for name, loop in loops.items()}  # also the warm-up
        verification = [_verdict(name, run, first["ours"]) for name, run in first.items() if name != "ours"]
        ok = all(row["ok"] for row in verification)
        rounds = _rounds(loops, options.repeats) if ok else {}
        stages = [_stage(folder, options, group, stage) for stage in options.stages] if ok else []
    for row in stages:
        row["peak_memory_mib"] = _peak(options, row["zero_stage"])
    return {"benchmark": "training", "schema_version": 1, "ok": ok, "options": options._asdict(),
            "environment": harness.environment(options.device, options.dtype),
            "parameters": sum(p.numel() for p in given.model.parameters()), "verification": verification,
            "results": [_row(name, runs, options) for name, runs in rounds.items()], "stages": stages,
            "overhead_over_plain": _ratio(rounds, "plain"), "overhead_over_xtransformers": _ratio(rounds, "x-transformers")}


def _verdict(name: str, run: Run, expected: Run) -> dict[str, Any]:
    # x-transformers keeps positions at another scale, so that AdamW moves them otherwise from the first step on
    steps = 1 if name == "x-transformers" else len(expected.losses)
    gap = max(abs(a - b) / abs(b) for a, b in zip(run.losses[:steps], expected.losses[:steps], strict=True))
    return {"loop": name, "steps": steps, "largest_relative_gap": gap, "tolerance": TOLERANCE, "ok": gap <= TOLERANCE}


def _rounds(loops: dict[str, Callable[[], Run]], repeats: int) -> dict[str, list[float]]:
    """Median seconds of a step in every round; the loops take turns, every second round backwards."""
    taken: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(repeats):
        for name in list(loops) if number % 2 == 0 else reversed(list(loops)):
            taken[name].append(statistics.median(loops[name]().seconds))
            print(f"benchmarks training: {name}: {taken[name][-1] * 1e3:.1f} ms a step", file=sys.stderr, flush=True)
    return taken


def _ratio(rounds: dict[str, list[float]], peer: str) -> float | None:
    """Median over the rounds of our time / theirs, less 1."""
    if not rounds:
        return None
    return round(statistics.median(a / b for a, b in zip(rounds["ours"], rounds[peer], strict=True)) - 1, 4)


def _row(name: str, seconds: list[float], options: Options) -> dict[str, Any]:
    low, middle, high = harness.quartiles(seconds)
    return {"loop": name, "step_s": round(middle, 5), "quartile1_s": round(low, 5), "quartile3_s": round(high, 5),
            "tokens_per_s": round(options.batch * options.grid**2 / middle, 1)}


def _stage(folder: Path, options: Options, group: Processes, stage: int) -> dict[str, Any]:
    run = ours(folder, options, group, stage)
    seconds = statistics.median(run.seconds)
    return {"zero_stage": stage, "step_s": round(seconds, 5),
            "tokens_per_s": round(options.batch * options.grid**2 / seconds, 1)}


def _peak(options: Options, stage: int) -> float:
    """MiB of three steps in a process of its own, which must not find the names of this one's process group."""
    for name in (*LAUNCHERS_NAMES, STARTED_ALONE):
        os.environ.pop(name, None)
    return harness.peak_memory("benchmarks.training:stage_case", {"options": options._asdict(), "stage": stage}, options.device,
                               options.threads)


def stage_case(options: dict[str, Any], stage: int) -> Case:
    """Three steps of ours at a ZeRO stage, model and optimizer included. The arguments are JSON values."""
    chosen = Options(**options)._replace(steps=3)
    folder = Path(tempfile.mkdtemp())
    make_data(folder, chosen)

    def case() -> None:
        with processes(chosen.threads) as group:
            ours(folder, chosen, group, stage)

    return case


def parse(argv: Sequence[str] | None) -> tuple[Options, str | None]:
    """Options and --out. UserError for what cannot be measured."""
    parser = harness.command_parser("training", __doc__)
    parser.add_argument("--quick", action="store_true", help="other defaults: width 64, 2 layers, 8x8 codes, batch 4, 6 steps")
    parser.add_argument("--width", type=int, help="of the model (default 256)")
    parser.add_argument("--layers", type=int, help="of the decoder (default 4)")
    parser.add_argument("--grid", type=int, help="rows and columns of codes (default 16)")
    parser.add_argument("--batch", type=int, help="pictures a step (default 8)")
    parser.add_argument("--steps", type=int, help="of each loop in a round (default 12)")
    parser.add_argument("--stages", help="ZeRO stages to measure one after another (default 0,1,2,3; quick: none)")
    harness.add_common_options(parser, "default 5; quick 2")
    args = parser.parse_args(argv)
    defaults: dict[str, Any] = {"width": 256, "layers": 4, "grid": 16, "batch": 8, "steps": 12, "stages": "0,1,2,3",
                                "repeats": 5}
    if args.quick:
        defaults = {"width": 64, "layers": 2, "grid": 8, "batch": 4, "steps": 6, "stages": "", "repeats": 2}
    harness.fill_in(args, defaults, {"width": 64, "layers": 1, "grid": 2, "batch": 1, "steps": 3, "repeats": 1})
    if args.width % 64:
        raise UserError(f"--width {args.width} must be a multiple of 64, the width of a head")
    wanted = [part.strip() for part in args.stages.split(",") if part.strip()]
    if not set(wanted) <= {"0", "1", "2", "3"}:
        raise UserError(f"--stages '{args.stages}': expected ZeRO stages from 0 to 3, separated by commas, for example 0,1")
    harness.start(args.device, args.threads)
    options = Options(args.quick, args.width, args.layers, args.grid, args.batch, args.steps, list(map(int, wanted)),
                      args.repeats, args.device, args.dtype, torch.get_num_threads())
    return options, args.out


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, show, write. RunFailedError if the loops do not do the same work."""
    options, name = parse(argv)
    out = harness.check_output(name)
    document = measure(options)
    print(f"{document['parameters'] / 1e6:.1f}M numbers, {options.batch} x {options.grid**2} tokens a step\n")
    for rows in (document["results"], document["stages"]):
        print(f"{harness.table(rows)}\n")
    harness.finish(document, out)
    harness.require_same_work(document, "the hand-written loops")
    return 0
