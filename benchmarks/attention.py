"""Sparse attention patterns: speed and peak memory beside scaled_dot_product_attention with a dense mask.

    python -m benchmarks attention --quick                              (about a minute on one core; no memory of forward)
    python -m benchmarks attention --threads 2 --out attention.json     (CPU, 256 text slots and 32x32 codes, as DALL-E)
    python -m benchmarks attention --device cuda --dtype bfloat16 --batch 8 --heads 16

Ours is what a layer of our models runs (`seq2seq.layers.PatternAttend`: `attend` on the CPU, `attend_flex` for the sparse
patterns on CUDA). The peer is what one would write without it: one call with a [n, n] mask made by `Pattern.mask`. Nothing is
timed before both have been seen to do the same work: equal outputs and equal gradients of query, key and value.

Axes: B batch, H heads, n slots (prefix and image), d head width.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import SEED, Case, peak_memory, speed_ratio, time_alternating
from seq2seq.attention import PATTERNS, Pattern
from seq2seq.layers import PatternAttend
from tokenloom_common.errors import UserError

PEER_NAME = "scaled_dot_product_attention with a dense mask"
THIS = "benchmarks.attention"
SIDES = ("ours", "peer")
STEPS = ("forward", "forward+backward")
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest difference allowed, as a share of the peer's largest value.

float32: a hundred times what roundings come to; one key too many or too few is more. bfloat16: a gradient of the prefix is a
sum over blocks of queries, each rounded to 8 bits.
"""
MAX_SLOTS = 16_384  # the peer's mask is 256 MiB, and eight times that while it is made
MAX_NUMBERS = 2**31
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Problem(NamedTuple):
    """One attention call, as JSON values, so that a child process builds the same one."""

    pattern: str
    batch: int
    grid: int
    prefix: int
    convolution: int
    heads: int
    head_dim: int
    device: str
    dtype: str

    @property
    def slots(self) -> int:
        """n: the prefix and a square grid of image slots."""
        return self.prefix + self.grid**2

    def rule(self) -> Pattern:
        """Which slot sees which."""
        return Pattern(self.pattern, self.prefix, self.grid, self.convolution)


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
        """One call of this size."""
        return Problem(pattern, batch, self.grid, self.prefix, self.convolution, self.heads, self.head_dim, self.device,
                       dtype or self.dtype)

    def peak(self, side: str, step: str, problem: Problem) -> float | None:
        """Peak memory of a `step_case`, MiB. With --quick only of the step that needs more: each figure is a new process."""
        if self.quick and step != STEPS[-1]:
            return None
        return peak_memory(f"{THIS}:step_case", {"side": side, "step": step, **problem._asdict()}, self.device, self.threads)


class Heads(NamedTuple):
    """Query, key, value and the gradient that arrives at the output, each [B, H, n, d]."""

    query: Tensor
    key: Tensor
    value: Tensor
    upstream: Tensor


def make_heads(problem: Problem) -> Heads:
    """Seeded noise, laid out as a layer's projections leave it: [B, n, H, d] with two axes swapped."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (problem.batch, problem.slots, problem.heads, problem.head_dim)
    query, key, value, upstream = (
        torch.randn(shape, generator=generator).to(problem.device, harness.DTYPES[problem.dtype]).transpose(1, 2)
        for _ in Heads._fields)
    return Heads(query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), upstream)


def share_of_pairs_seen(pattern: Pattern, slots: int) -> float:
    """Of all n * n pairs of a query and a key, those that the pattern sees; a dense mask computes all of them."""
    return float(pattern.mask(slots).double().mean())


def make_attend(side: str, problem: Problem) -> Attend:
    """query, key, value -> output, of `ours` or the `peer`, whose mask is made here and not in each call."""
    if side == "ours":
        block = PatternAttend(problem.rule(), dropout=0.0)
        return lambda query, key, value: block(query, key, value)[0]
    mask = problem.rule().mask(problem.slots).to(problem.device)
    return lambda query, key, value: F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def run_step(step: str, attend: Attend, heads: Heads) -> tuple[Tensor, ...]:
    """`forward`: the output alone. `forward+backward`: the output and the gradients of query, key and value."""
    inputs = (heads.query, heads.key, heads.value)
    if step == "forward":
        with torch.no_grad():
            return (attend(*inputs),)
    out = attend(*inputs)
    return out.detach(), *torch.autograd.grad(out, inputs, heads.upstream)


def step_case(side: str, step: str, **problem: Any) -> Case:
    """A case that has run once: masks are made and kernels compiled, as in every step of a training run but its first."""
    size = Problem(**problem)
    attend, heads = make_attend(side, size), make_heads(size)
    run_step(step, attend, heads)
    return lambda: run_step(step, attend, heads)


# ---- measuring

def forget_compiled(device: str) -> None:
    """Flex attention compiles anew for every size; after 8 (torch's recompile limit) it would run uncompiled, in silence."""
    if device == "cuda":
        torch.compiler.reset()


def relative_gap(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference as a share of their largest value; infinite if one of the numbers is not finite."""
    gap = float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
    return gap if math.isfinite(gap) else math.inf


def verify(problem: Problem) -> dict[str, Any]:
    """Whether ours and the peer give the same output, with and without gradients, and the same gradients."""
    heads = make_heads(problem)
    gaps: dict[str, list[float]] = {}
    for step in STEPS:
        ours, theirs = (run_step(step, make_attend(side, problem), heads) for side in SIDES)
        gaps[step] = [relative_gap(a, b) for a, b in zip(ours, theirs, strict=True)]
    (plain,), (output, *gradients) = gaps["forward"], gaps["forward+backward"]
    largest = {"output_gap": max(plain, output), "gradient_gap": max(gradients)}
    return {"pattern": problem.pattern, "batch": problem.batch, "dtype": problem.dtype,
            **{name: float(f"{gap:.3g}") if math.isfinite(gap) else None for name, gap in largest.items()},
            "tolerance": TOLERANCE[problem.dtype], "ok": max(largest.values()) <= TOLERANCE[problem.dtype]}


def verification(options: Options) -> list[dict[str, Any]]:
    """`verify` for everything that is timed, and in float32 as well: bfloat16's roundings would hide small mistakes."""
    rows = []
    for batch in options.batches:
        for name in PATTERNS:
            say(f"same work? {name}, batch {batch}")
            for dtype in dict.fromkeys(["float32", options.dtype]):
                forget_compiled(options.device)
                rows.append(verify(options.problem(name, batch, dtype)))
    return rows


def speed(options: Options) -> list[dict[str, Any]]:
    """Rows of every pattern, forward and forward+backward, for every batch; all patterns and both sides take turns."""
    shares = {name: share_of_pairs_seen((problem := options.problem(name, 1)).rule(), problem.slots) for name in PATTERNS}
    rows = []
    for batch in options.batches:
        problems = {name: options.problem(name, batch) for name in PATTERNS}
        for step in STEPS:
            say(f"{step}, batch {batch}")
            forget_compiled(options.device)
            timed = time_alternating(_cases(step, problems), options.repeats, options.device)
            for name, problem in problems.items():
                row: dict[str, Any] = {
                    "step": step, "pattern": name, "batch": batch, "share_of_pairs_seen": round(shares[name], 6),
                    "ideal_ratio": round(1 / shares[name], 3),
                    "ratio": speed_ratio(timed[f"{name} ours"], timed[f"{name} peer"])}
                rows.append(row | {side: {**timed[f"{name} {side}"].summary(),
                                          "peak_memory_mib": options.peak(side, step, problem)} for side in SIDES})
    return rows


def _cases(step: str, problems: dict[str, Problem]) -> dict[str, Case]:
    """`row ours`, `row peer`, ...: all on the same query, key and value."""
    heads = make_heads(next(iter(problems.values())))
    cases: dict[str, Case] = {}
    for name, problem in problems.items():
        for side in SIDES:
            attend = make_attend(side, problem)
            cases[f"{name} {side}"] = lambda attend=attend: run_step(step, attend, heads)  # type: ignore[misc]
    return cases


# ---- the command

def say(text: str) -> None:
    """A line of progress."""
    print(f"benchmarks attention: {text}", file=sys.stderr, flush=True)


def measure(options: Options) -> dict[str, Any]:
    """The whole document. With `ok` false nothing has been timed."""
    document: dict[str, Any] = {
        "benchmark": "attention", "schema_version": 1, "ok": True, "options": options._asdict(),
        "environment": harness.environment(options.device, options.dtype),
        "peer": {"name": PEER_NAME, "version": torch.__version__}, "notes": []}
    if options.convolution // 2 >= options.grid - 1:
        document["notes"].append(f"a convolution of {options.convolution} covers all of {options.grid} x {options.grid} slots: "
                                 "it sees what full attention sees")
    document["verification"] = verification(options)
    document["ok"] = all(row["ok"] for row in document["verification"])
    document["rows"] = speed(options) if document["ok"] else []
    return document


def show(document: dict[str, Any]) -> None:
    """The table for people."""
    keys = ("median_s", "peak_memory_mib")
    flat = [{**{key: value for key, value in row.items() if key not in SIDES},
             **{f"{side} {key}": row[side][key] for key in keys for side in SIDES}} for row in document["rows"]]
    if flat:
        print("ours and a dense mask (ratio above 1: ours is faster; ideal_ratio: all pairs / pairs that are seen)\n"
              f"{harness.table(flat)}\n")
    for note in document["notes"]:
        print(f"note: {note}")


def parse(argv: Sequence[str] | None) -> tuple[Options, str | None]:
    """Options and --out. UserError for what cannot be measured."""
    parser = harness.command_parser("attention", __doc__)
    parser.add_argument("--quick", action="store_true",
                        help="other defaults: 64 text slots, batch 1, 2 heads of width 32; memory of forward+backward alone")
    parser.add_argument("--grid", type=int, help="rows and columns of the code grid (default 32)")
    parser.add_argument("--prefix", type=int, help="text slots before the image (default 256)")
    parser.add_argument("--batch", help="batch sizes (default 4)")
    parser.add_argument("--heads", type=int, help="attention heads (default 8)")
    parser.add_argument("--head-dim", type=int, help="width of a head (default 64)")
    parser.add_argument("--convolution", type=int, default=11, help="side of the convolution's neighbourhood (default 11)")
    harness.add_common_options(parser, "default 5; quick 9")
    args = parser.parse_args(argv)
    defaults: dict[str, Any] = {"grid": 32, "prefix": 256, "batch": "4", "heads": 8, "head_dim": 64, "repeats": 5}
    if args.quick:
        defaults = {"grid": 32, "prefix": 64, "batch": "1", "heads": 2, "head_dim": 32, "repeats": 9}
    harness.fill_in(args, defaults, {"grid": 1, "prefix": 0, "heads": 1, "head_dim": 1, "convolution": 3, "repeats": 1})
    batches = harness.whole_numbers(args.batch, "--batch")
    harness.start(args.device, args.threads)
    options = Options(args.quick, args.grid, args.prefix, batches, args.heads, args.head_dim, args.convolution, args.repeats,
                      args.device, args.dtype, torch.get_num_threads())
    check_size(options)
    return options, args.out


def check_size(options: Options) -> None:
    """UserError for a size that no pattern, no kernel or no machine can take."""
    slots, batch = options.problem("full", 1).slots, max(options.batches)
    if options.convolution % 2 == 0:
        raise UserError(f"--convolution {options.convolution} must be odd, so that it has a middle")
    if slots > MAX_SLOTS:
        raise UserError(f"--grid {options.grid} and --prefix {options.prefix} are {slots:,} slots; the peer's mask of all "
                        f"against all takes at most {MAX_SLOTS:,}")
    numbers = batch * options.heads * slots * options.head_dim
    if numbers > MAX_NUMBERS:
        raise UserError(f"--batch {batch}, --heads {options.heads} and --head-dim {options.head_dim} make a query of "
                        f"{numbers:,} numbers; at most {MAX_NUMBERS:,}")
    if options.device == "cuda" and options.head_dim < 16:
        raise UserError(f"--head-dim {options.head_dim} must be at least 16 on CUDA (flex attention)")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, show, write. RunFailedError if ours and the peer do not do the same work."""
    options, name = parse(argv)
    out = harness.check_output(name)
    document = measure(options)
    show(document)
    harness.finish(document, out)
    harness.require_same_work(document, PEER_NAME)
    return 0
