"""Sparse attention patterns: speed and peak memory beside one attention call with a dense mask.

    python -m benchmarks attention --quick        (about a minute on one core; no memory of forward)
    python -m benchmarks attention --threads 2 --out attention.json         (CPU, DALL-E's sequence)
    python -m benchmarks attention --device cuda --dtype bfloat16 --batch 8 --heads 16

Ours is what a layer of our models runs (`seq2seq.layers.PatternAttend`: `attend` on the CPU,
`attend_flex` for the sparse patterns on CUDA). The peer is scaled_dot_product_attention with an
[n, n] mask made by `Pattern.mask`. Nothing is timed before both are seen to do the same work: equal
outputs and equal gradients of query, key and value.
"""

# Axes: B batch, H heads, n slots (prefix and image), d head width

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import command_line, harness
from benchmarks.attention_cases import Problem, make_attend, make_heads, run_step
from benchmarks.harness import Case, peak_memory, speed_ratio, time_alternating
from seq2seq.attention import PATTERNS, Pattern
from tokenloom_common.errors import UserError

PEER_NAME = "scaled_dot_product_attention with a dense mask"
SIDES = ("ours", "peer")
STEPS = ("forward", "forward+backward")
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest difference allowed, as a share of the peer's largest value.

float32: a hundred times the rounding errors; one key too many or too few is more. bfloat16: a
gradient of the prefix is a sum over blocks of queries, each rounded to 8 bits.
"""
MAX_SLOTS = 16_384  # the peer's mask is 256 MiB, and eight times that while it is made
MAX_NUMBERS = 2**31  # 8 GiB in float32 for the query alone
say = partial(command_line.say, "attention")


class Options(NamedTuple):
    """The command line, checked."""

    quick: bool
    grid: int
    prefix: int
    batches: list[int]
    heads: int
    head_dim: int
    convolution: int
    repeats: int
    device: str
    dtype: str
    threads: int

    def problem(self, pattern: str, batch: int, dtype: str | None = None) -> Problem:
        """Make one call of this size."""
        return Problem(pattern, batch, self.grid, self.prefix, self.convolution, self.heads,
                       self.head_dim, self.device, dtype or self.dtype)

    def peak(self, side: str, step: str, problem: Problem) -> float | None:
        """Measure the peak memory of a `step_case` in MiB.

        With --quick only of the step that needs more: each figure is a new process.
        """
        if self.quick and step != STEPS[-1]:
            return None
        arguments = {"side": side, "step": step, **problem._asdict()}
        return peak_memory("benchmarks.attention_cases:step_case", arguments, self.device,
                           self.threads)


def share_of_pairs_seen(pattern: Pattern, slots: int) -> float:
    """Share of the n * n pairs of query and key that the pattern sees; a dense mask takes all."""
    return float(pattern.mask(slots).double().mean())


def forget_compiled(device: str) -> None:
    """Reset torch.compile on CUDA.

    Flex attention compiles anew for every size; after 8 (torch's recompile limit) it would silently
    run uncompiled.
    """
    if device == "cuda":
        torch.compiler.reset()


# ---- the same work

def relative_gap(ours: Tensor, peer: Tensor) -> float:
    """Largest difference as a share of the peer's largest value; infinite if not a number."""
    # in float64: a difference of two bfloat16 tensors would be rounded itself
    ours, peer = ours.double(), peer.double()
    gap = float((ours - peer).abs().max() / peer.abs().max())
    return gap if math.isfinite(gap) else math.inf


def verify(problem: Problem) -> dict[str, Any]:
    """Compare the outputs of ours and the peer, with and without gradients, and the gradients."""
    heads = make_heads(problem)
    gaps: dict[str, list[float]] = {}
    for step in STEPS:
        ours, peer = (run_step(step, make_attend(side, problem), heads) for side in SIDES)
        gaps[step] = [relative_gap(one, other) for one, other in zip(ours, peer, strict=True)]

    # without gradients a kernel may take another path, so that both outputs count
    output, *gradients = gaps["forward+backward"]
    output_gap = max(*gaps["forward"], output)
    gradient_gap = max(gradients)
    tolerance = TOLERANCE[problem.dtype]
    return {"pattern": problem.pattern, "batch": problem.batch, "dtype": problem.dtype,
            "output_gap": _rounded(output_gap), "gradient_gap": _rounded(gradient_gap),
            "tolerance": tolerance, "ok": max(output_gap, gradient_gap) <= tolerance}


def _rounded(gap: float) -> float | None:
    """Three digits; None for a gap that is not finite, which JSON cannot hold."""
    return float(f"{gap:.3g}") if math.isfinite(gap) else None


def verification(options: Options) -> list[dict[str, Any]]:
    """Verify all that is timed, and in float32 too: bfloat16's rounding hides small mistakes."""
    rows = []
    for batch in options.batches:
        for name in PATTERNS:
            say(f"same work? {name}, batch {batch}")
            for dtype in dict.fromkeys(["float32", options.dtype]):
                forget_compiled(options.device)
                rows.append(verify(options.problem(name, batch, dtype)))
    return rows


# ---- speed and memory

def speed(options: Options) -> list[dict[str, Any]]:
    """Measure every pattern, step and batch; all patterns and both sides take turns."""
    # of the mask alone: equal for every batch
    shares = {}
    for name in PATTERNS:
        problem = options.problem(name, 1)
        shares[name] = share_of_pairs_seen(problem.rule(), problem.slots)

    rows = []
    for batch in options.batches:
        problems = {name: options.problem(name, batch) for name in PATTERNS}
        for step in STEPS:
            say(f"{step}, batch {batch}")
            forget_compiled(options.device)
            timed = time_alternating(_cases(step, problems), options.repeats, options.device)
            for name, problem in problems.items():
                ours, peer = timed[f"{name} ours"], timed[f"{name} peer"]
                row: dict[str, Any] = {
                    "step": step, "pattern": name, "batch": batch,
                    "share_of_pairs_seen": round(shares[name], 6),
                    "ideal_ratio": round(1 / shares[name], 3), "ratio": speed_ratio(ours, peer)}
                for side, timing in (("ours", ours), ("peer", peer)):
                    peak = options.peak(side, step, problem)
                    row[side] = {**timing.summary(), "peak_memory_mib": peak}
                rows.append(row)
    return rows


def _cases(step: str, problems: dict[str, Problem]) -> dict[str, Case]:
    """Build the cases "row ours", "row peer", ...: all on the same query, key and value."""
    heads = make_heads(next(iter(problems.values())))  # problems differ in their pattern alone
    cases: dict[str, Case] = {}
    for name, problem in problems.items():
        for side in SIDES:
            attend = make_attend(side, problem)
            cases[f"{name} {side}"] = partial(run_step, step, attend, heads)
    return cases


# ---- the command

def measure(options: Options) -> dict[str, Any]:
    """Return the whole document. If its `ok` is false, nothing has been timed."""
    document: dict[str, Any] = {
        "benchmark": "attention", "schema_version": 1, "ok": True, "options": options._asdict(),
        "environment": harness.environment(options.device, options.dtype),
        "peer": {"name": PEER_NAME, "version": torch.__version__}, "notes": []}
    # its row would show full attention's figures under another name
    if options.convolution // 2 >= options.grid - 1:
        document["notes"].append(
            f"a convolution of {options.convolution} covers all of {options.grid} x {options.grid} "
            "slots: it sees what full attention sees")

    document["verification"] = verification(options)
    document["ok"] = all(row["ok"] for row in document["verification"])
    document["rows"] = speed(options) if document["ok"] else []
    return document


def show(document: dict[str, Any]) -> None:
    """Print the table and the notes."""
    rows = []
    for row in document["rows"]:
        flat = {key: value for key, value in row.items() if key not in SIDES}
        for key in ("median_s", "peak_memory_mib"):
            flat |= {f"{side} {key}": row[side][key] for side in SIDES}
        rows.append(flat)
    if rows:
        print("ours and a dense mask (ratio above 1: ours is faster; ideal_ratio: all pairs / "
              f"pairs that are seen)\n{command_line.table(rows)}\n")
    for note in document["notes"]:
        print(f"note: {note}")


def parse(argv: Sequence[str] | None) -> tuple[Options, str | None]:
    """Parse the options and --out. UserError for a size that cannot be measured."""
    parser = command_line.command_parser("attention", __doc__)
    parser.add_argument("--quick", action="store_true",
                        help="other defaults: 64 text slots, batch 1, 2 heads of width 32; memory "
                        "of forward+backward alone")
    parser.add_argument("--grid", type=int, help="rows and columns of the code grid (default 32)")
    parser.add_argument("--prefix", type=int, help="text slots before the image (default 256)")
    parser.add_argument("--batch", help="batch sizes (default 4)")
    parser.add_argument("--heads", type=int, help="attention heads (default 8)")
    parser.add_argument("--head-dim", type=int, help="width of a head (default 64)")
    parser.add_argument("--convolution", type=int, default=11,
                        help="side of the convolution's neighbourhood (default 11)")
    command_line.add_common_options(parser, "default 5; quick 9")
    args = parser.parse_args(argv)

    defaults: dict[str, Any] = {"grid": 32, "prefix": 256, "batch": "4", "heads": 8, "head_dim": 64,
                                "repeats": 5}
    if args.quick:
        defaults = {"grid": 32, "prefix": 64, "batch": "1", "heads": 2, "head_dim": 32,
                    "repeats": 9}
    least = {"grid": 1, "prefix": 0, "heads": 1, "head_dim": 1, "convolution": 3, "repeats": 1}
    command_line.fill_in(args, defaults, least)

    batches = command_line.whole_numbers(args.batch, "--batch")
    harness.start(args.device, args.threads)
    options = Options(args.quick, args.grid, args.prefix, batches, args.heads, args.head_dim,
                      args.convolution, args.repeats, args.device, args.dtype,
                      torch.get_num_threads())
    check_size(options)
    return options, args.out


def check_size(options: Options) -> None:
    """UserError for a size beyond a pattern, a kernel or the machine."""
    if options.convolution % 2 == 0:
        raise UserError(f"--convolution {options.convolution} must be odd, so that it has a middle")

    slots = options.problem("full", 1).slots  # the same for every pattern
    if slots > MAX_SLOTS:
        raise UserError(f"--grid {options.grid} and --prefix {options.prefix} are {slots:,} slots; "
                        f"the peer's mask of all against all takes at most {MAX_SLOTS:,}")
    batch = max(options.batches)
    numbers = batch * options.heads * slots * options.head_dim
    if numbers > MAX_NUMBERS:
        raise UserError(f"--batch {batch}, --heads {options.heads} and --head-dim "
                        f"{options.head_dim} make a query of {numbers:,} numbers; at most "
                        f"{MAX_NUMBERS:,}")
    if options.device == "cuda" and options.head_dim < 16:
        raise UserError(f"--head-dim {options.head_dim} must be at least 16 on CUDA "
                        "(flex attention)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. RunFailedError if ours and the peer do not do the same work."""
    options, out = parse(argv)
    return command_line.run_benchmark(lambda: measure(options), show, out, PEER_NAME)
