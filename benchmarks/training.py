"""A training step: ours, with all a run does, beside loops in plain PyTorch and x-transformers.

    python -m benchmarks training --quick                           (ten seconds on two cores)
    python -m benchmarks training --threads 2 --json training.json   (CPU, a step of half a second)
    python -m benchmarks training --stages 0,1,2,3                   (ZeRO stages in one process)

`ours` is the loop of `training/train_seq2seq.py`: token shards, DeepSpeed, log lines, watchdog.
`plain` is the same model, AdamW, schedule and clipping on the same batches, collated before the
clock starts, in ten lines. `x-transformers` is its AutoregressiveWrapper over the same decoder with
its own attention. Nothing is timed before their losses are seen to be equal: those of every step in
plain PyTorch, that of the first step in x-transformers, which keeps positions at another scale. A
round trains each for the same number of steps, in turns; a step's time is the median of all but the
first.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from benchmarks import command_line, harness
from benchmarks.harness import SEED, Case
from benchmarks.training_loops import Batches, Options, Run, hand_written, ours
from tokenizer_image import VQGAN, VQGANConfig
from tokenizer_image.fingerprint import code_fingerprint
from tokenloom_common.errors import UserError
from training.data.tokens.shards import SplitIndex, TokenIndex, write_index, write_shard
from training.engine.launch import processes
from training.engine.processes import Processes
from training.engine.stopping import STARTED_ALONE
from training.engine.universal import LAUNCHERS_NAMES

TOLERANCE = 2e-4
"""Largest relative difference of two loops' losses; float32 sums in another order come to 1e-6."""
CODEBOOK_SIZE = 1024
WORDS = ("red", "green", "blue", "large", "small", "heart", "circle", "square", "apple", "cat",
         "above", "a")


def make_data(folder: Path, options: Options) -> None:
    """Write `tokenizer` and `tokens`: random codes and captions, new ones for every step."""
    torch.manual_seed(SEED)
    # as small as it may be: without samples, a run does not decode with it
    config = VQGANConfig(resolution=options.grid * 4, channels=8, channel_multipliers=(1, 1, 1),
                         num_res_blocks=1, norm_groups=4, attention_resolutions=(),
                         mid_attention=False, z_channels=8, embed_dim=4,
                         codebook_size=CODEBOOK_SIZE)
    tokenizer = VQGAN(config).eval()
    tokenizer.save_pretrained(folder / "tokenizer")

    (folder / "tokens").mkdir()
    generator = numpy.random.default_rng(SEED)
    rows = options.batch * options.steps  # one epoch
    shape = (rows, options.grid**2)
    tokens = generator.integers(0, CODEBOOK_SIZE, shape).astype(numpy.uint16)
    captions = [[" ".join(generator.choice(WORDS, 6))] for _ in range(rows)]
    keys = [f"k{row}" for row in range(rows)]
    file = write_shard(folder / "tokens/train-00000-of-00001.arrow", captions, tokens, keys)
    index = TokenIndex(tokenizer_fingerprint=code_fingerprint(tokenizer),
                       codebook_size=CODEBOOK_SIZE, grid=(options.grid, options.grid),
                       splits={"train": SplitIndex(rows=rows, files=[file])})
    write_index(folder / "tokens", index)


def measure(options: Options) -> dict[str, Any]:
    """Return the document. If its `ok` is false, nothing has been timed."""
    rounds: dict[str, list[float]] = {}
    stages: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, processes(options.threads) as group:
        folder = Path(name)
        make_data(folder, options)
        given = Batches.of(folder, options, group)  # before `ours` runs: a fresh model
        loops: dict[str, Callable[[], Run]] = {
            "ours": lambda: ours(folder, options, group),
            "plain": lambda: hand_written(given, group, peer=False),
            "x-transformers": lambda: hand_written(given, group, peer=True)}

        first = {name: loop() for name, loop in loops.items()}  # also the warm-up
        verification = [_verdict(name, run, first["ours"]) for name, run in first.items()
                        if name != "ours"]
        ok = all(row["ok"] for row in verification)
        if ok:
            rounds = _time_rounds(loops, options.repeats)
            stages = [_time_stage(folder, options, group, stage) for stage in options.stages]

    # after our process group has ended: the child makes one of its own
    for row in stages:
        row["peak_memory_mib"] = _peak(options, row["zero_stage"])
    parameters = sum(parameter.numel() for parameter in given.model.parameters())
    return {"benchmark": "training", "schema_version": 1, "ok": ok, "options": options._asdict(),
            "environment": harness.environment(options.device, options.dtype),
            "parameters": parameters, "verification": verification,
            "results": [_result(name, seconds, options) for name, seconds in rounds.items()],
            "stages": stages, "overhead_over_plain": _overhead(rounds, "plain"),
            "overhead_over_xtransformers": _overhead(rounds, "x-transformers")}


def _verdict(name: str, run: Run, expected: Run) -> dict[str, Any]:
    # x-transformers keeps positions at another scale, so that AdamW moves them otherwise
    steps = 1 if name == "x-transformers" else len(expected.losses)
    pairs = zip(run.losses[:steps], expected.losses[:steps], strict=True)
    gap = max(abs(loss - wanted) / abs(wanted) for loss, wanted in pairs)
    return {"loop": name, "steps": steps, "largest_relative_gap": gap, "tolerance": TOLERANCE,
            "ok": gap <= TOLERANCE}


def _time_rounds(loops: dict[str, Callable[[], Run]], repeats: int) -> dict[str, list[float]]:
    """Return the median seconds of a step in every round; the loops take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for name in harness.in_turns(loops, repeats):
        step = statistics.median(loops[name]().seconds)
        seconds[name].append(step)
        command_line.say("training", f"{name}: {step * 1e3:.1f} ms a step")
    return seconds


def _overhead(rounds: dict[str, list[float]], peer: str) -> float | None:
    """Median over the rounds of our time / the peer's, less 1."""
    if not rounds:
        return None
    pairs = zip(rounds["ours"], rounds[peer], strict=True)
    return round(statistics.median(our / peers for our, peers in pairs) - 1, 4)


def _result(name: str, seconds: list[float], options: Options) -> dict[str, Any]:
    low, middle, high = harness.quartiles(seconds)
    return {"loop": name, "step_s": round(middle, 5), "quartile1_s": round(low, 5),
            "quartile3_s": round(high, 5), "tokens_per_s": _tokens_per_s(middle, options)}


def _tokens_per_s(seconds: float, options: Options) -> float:
    return round(options.batch * options.grid**2 / seconds, 1)


def _time_stage(folder: Path, options: Options, group: Processes, stage: int) -> dict[str, Any]:
    seconds = statistics.median(ours(folder, options, group, stage).seconds)
    return {"zero_stage": stage, "step_s": round(seconds, 5),
            "tokens_per_s": _tokens_per_s(seconds, options)}


def _peak(options: Options, stage: int) -> float:
    """Measure the MiB of three steps in a fresh process."""
    # the child must not find the environment variables of this process's group
    for name in (*LAUNCHERS_NAMES, STARTED_ALONE):
        os.environ.pop(name, None)
    arguments = {"options": options._asdict(), "stage": stage}
    return harness.peak_memory("benchmarks.training:stage_case", arguments, options.device,
                               options.threads)


def stage_case(options: dict[str, Any], stage: int) -> Case:
    """Three steps of ours at a ZeRO stage, model and optimizer included. Takes JSON values."""
    chosen = Options(**options)._replace(steps=3)  # AdamW's moments exist from the first one on
    folder = Path(tempfile.mkdtemp())
    make_data(folder, chosen)

    def case() -> None:
        with processes(chosen.threads) as group:
            ours(folder, chosen, group, stage)

    return case


def show(document: dict[str, Any]) -> None:
    """Print the tables."""
    options = Options(**document["options"])
    millions = document["parameters"] / 1e6
    print(f"{millions:.1f}M parameters, {options.batch} x {options.grid**2} tokens a step\n")
    for rows in (document["results"], document["stages"]):
        print(f"{command_line.table(rows)}\n")


def parse(argv: Sequence[str] | None) -> tuple[Options, str | None]:
    """Parse the options and --out. UserError for what cannot be measured."""
    parser = command_line.command_parser("training", __doc__)
    parser.add_argument("--quick", action="store_true",
                        help="other defaults: width 64, 2 layers, 8x8 codes, batch 4, 6 steps")
    parser.add_argument("--width", type=int, help="of the model (default 256)")
    parser.add_argument("--layers", type=int, help="of the decoder (default 4)")
    parser.add_argument("--grid", type=int, help="rows and columns of codes (default 16)")
    parser.add_argument("--batch", type=int, help="images per step (default 8)")
    parser.add_argument("--steps", type=int, help="of each loop in a round (default 12)")
    parser.add_argument("--stages", help="ZeRO stages to measure one after another (default "
                        "0,1,2,3; quick: none)")
    command_line.add_common_options(parser, "default 5; quick 2")
    args = parser.parse_args(argv)

    defaults: dict[str, Any] = {"width": 256, "layers": 4, "grid": 16, "batch": 8, "steps": 12,
                                "stages": "0,1,2,3", "repeats": 5}
    if args.quick:
        defaults = {"width": 64, "layers": 2, "grid": 8, "batch": 4, "steps": 6, "stages": "",
                    "repeats": 2}
    least = {"width": 64, "layers": 1, "grid": 2, "batch": 1, "steps": 3, "repeats": 1}
    command_line.fill_in(args, defaults, least)
    if args.width % 64:  # run_config makes heads of 64
        raise UserError(f"--width {args.width} must be a multiple of 64, the width of a head")

    wanted = [part.strip() for part in args.stages.split(",") if part.strip()]
    if not set(wanted) <= {"0", "1", "2", "3"}:
        raise UserError(f"--stages '{args.stages}': expected ZeRO stages from 0 to 3, separated by "
                        "commas, for example 0,1")
    stages = [int(stage) for stage in wanted]
    harness.start(args.device, args.threads)
    options = Options(args.quick, args.width, args.layers, args.grid, args.batch, args.steps,
                      stages, args.repeats, args.device, args.dtype, torch.get_num_threads())
    return options, args.out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. RunFailedError if the loops do not do the same work."""
    options, out = parse(argv)
    return command_line.run_benchmark(lambda: measure(options), show, out, "the hand-written loops")
