"""Drawing image tokens: our engine beside x-transformers, transformers and min-dalle, and how near the machine's limit it is.

    python -m benchmarks decode --quick                                 (about a minute on one core)
    python -m benchmarks decode --threads 2 --json decode.json          (CPU, 57M decoder, 256 tokens; half an hour)
    python -m benchmarks decode --model demo/model --jacobi 8,16 --batch 1      (a trained model; Jacobi decoding)
    python -m benchmarks decode --model dalle-mini --peers min-dalle --batch 1,8 --tokens 64 --guidance on
    python -m benchmarks decode --device cuda --dtype bfloat16 --model parti-750m --batch 1,8,32

One run: the same random weights in ours, x-transformers and min-dalle (transformers' BART has as many numbers a layer), all
engines in turn, in alternating order. Nothing is timed before each has been seen to do the same work. Every case begins with
text ids and ends with tokens: captions' encoder, cache, top-k sampling are part of it.

Axes: B pictures, R rows (B, or 2B with guidance), s tokens drawn.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks import command_line, harness
from benchmarks.decode.engines import Mode, OurEngine
from benchmarks.decode.limits import Limits, measure_limits, step_cost
from benchmarks.decode.peers import PEERS, Peer, make_peer, missing, peer_version
from benchmarks.decode.reference import Work
from benchmarks.decode.subject import Subject, subject_of
from benchmarks.harness import Case, Timing, speed_ratio, time_alternating
from inference.memory.estimate import Workload, estimate
from tokenloom_common.errors import RunFailedError, UserError, choose

GUIDANCE = {"on": (3.0,), "off": (1.0,), "both": (1.0, 3.0)}
RATIOS = {"ratio_vs_xtransformers": "x-transformers", "ratio_vs_transformers": "transformers",
          "ratio_vs_min_dalle": "min-dalle"}
"""Key of the document -> the peer that its ratios are against, in its fastest variant."""
UNCACHED = "x-transformers, no cache"
DEFAULT_PEERS = ("x-transformers", UNCACHED, "transformers", "transformers, static cache")


class Options(NamedTuple):
    """What is measured; as JSON in the document."""

    quick: bool
    model: str
    batches: list[int]
    tokens: int | None
    guidance: str
    peers: list[str]
    jacobi: list[int]
    int8: bool
    repeats: int
    device: str
    dtype: str
    threads: int


def say(text: str) -> None:
    """A line of progress."""
    print(f"benchmarks decode: {text}", file=sys.stderr, flush=True)


class Bench:
    """Everything that a run needs, built once: the subject, our engines, the peers that are there."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.subject: Subject = subject_of(options.model, options.quick, options.device, options.dtype)
        config = self.subject.model.config
        self.tokens = options.tokens or config.num_tokens
        if not 1 <= self.tokens <= config.num_tokens:
            raise UserError(f"--tokens {self.tokens}: a picture of this model has {config.num_tokens}")
        self.modes = [Mode(), *([Mode(int8=True)] if options.int8 else []), *[Mode(window=w) for w in options.jacobi]]
        self.ours = {int8: OurEngine(self.subject.model, int8) for int8 in {mode.int8 for mode in self.modes}}
        self.peers: dict[str, Peer] = {}
        self.peer_facts: dict[str, dict[str, Any]] = {}
        for name in options.peers:
            self._add_peer(name)

    def _add_peer(self, name: str) -> None:
        reason = missing(name)
        if reason is None:
            try:
                self.peers[name] = make_peer(name, self.subject.peer_model(name))
            except ValueError as error:
                reason = str(error)
        facts: dict[str, Any] = {"missing": reason} if reason is not None else {"version": peer_version(name)}
        if reason is None and self.subject.peer_shape_differs(name):
            facts["weights"] = "its own, of the same shape, with rotary 1d in place of 2d, which it does not have"
        if hasattr(self.peers.get(name), "layer_parameters"):
            facts["layer_parameters"] = self.peers[name].layer_parameters  # type: ignore[attr-defined]
            facts["our_layer_parameters"] = self.peers[name].our_layer_parameters  # type: ignore[attr-defined]
        self.peer_facts[name] = facts
        if reason is not None:
            say(f"{name}: left out: {reason}")

    def work(self, pictures: int, guidance: float, one_caption: bool = False) -> Work:
        """The same captions for every engine."""
        return self.subject.work(pictures, self.tokens, guidance, one_caption)

    def cases(self, pictures: int, guidance: float) -> dict[str, Case]:
        """Ours in each mode, then the peers that can do this work."""
        one_caption = any(peer.one_caption for peer in self.peers.values())
        work = self.work(pictures, guidance, one_caption)
        cases: dict[str, Case] = {mode.name: partial(self.ours[mode.int8].sample, work, mode.window) for mode in self.modes}
        for name, peer in self.peers.items():
            if peer.one_caption and guidance == 1:
                continue  # min-dalle always guides
            if name == UNCACHED and pictures > 1:
                continue  # a picture says enough, and takes long
            cases[name] = partial(peer.sample, work)
        return cases


def verification(bench: Bench) -> list[dict[str, Any]]:
    """Every engine's results against the training graph's, in float32, on a small copy of the subject where that is large."""
    rows = []
    small = bench.subject.small_model()
    for int8 in bench.ours:
        for guidance in (1.0, 3.0):
            say(f"same work? ours{' int8' if int8 else ''}, guidance {guidance:g}")
            engine = OurEngine(small, int8)
            rows.append({"engine": Mode(int8=int8).name} | engine.verify(small, bench.subject.small_work(small, guidance)))
    for name in bench.peers:
        say(f"same work? {name}")
        rows.append({"engine": name} | bench.subject.verify_peer(name, small))
    return rows


def speed(bench: Bench, limits: Limits) -> list[dict[str, Any]]:
    """A row for every engine, batch and guidance; engines take turns."""
    rows = []
    for guidance in GUIDANCE[bench.options.guidance]:
        for pictures in bench.options.batches:
            say(f"batch {pictures}, guidance {guidance:g}")
            timed = time_alternating(bench.cases(pictures, guidance), bench.options.repeats, bench.options.device)
            rows += [_row(bench, limits, name, pictures, guidance, timed) for name in timed]
            for row in rows[-len(timed):]:
                say(f"  {row['engine']}: {row['ms_per_token']:.2f} ms a token")
    return rows


def _row(bench: Bench, limits: Limits, name: str, pictures: int, guidance: float,
         timed: dict[str, Timing]) -> dict[str, Any]:
    timing, repeated = timed[name], 1 if guidance == 1 else 2
    row: dict[str, Any] = {
        "engine": name, "batch": pictures, "guidance": guidance, "rows": pictures * repeated, "tokens": bench.tokens,
        **timing.summary(), "ms_per_token": round(1e3 * statistics.median(timing.seconds) / bench.tokens, 4),
        "pictures_per_s": round(pictures / statistics.median(timing.seconds), 4)}
    mode = next((mode for mode in bench.modes if mode.name == name), None)
    if mode is None:
        return row | {"fraction_of_limit": None, "tokens_per_step": None, "ratios": {}}
    engine = bench.ours[mode.int8]
    cost = step_cost(engine.decoder, pictures * repeated, bench.tokens, bench.subject.caption_slots(pictures))
    fraction = None if mode.window > 1 else round(cost.seconds(limits) / (statistics.median(timing.seconds) / bench.tokens), 4)
    if mode.window > 1:
        engine.sample(bench.work(pictures, guidance), mode.window)
    ratios = {key: speed_ratio(timing, timed[peer]) for key, name in RATIOS.items() if (peer := _best(timed, name))}
    return row | {"fraction_of_limit": fraction, "ratios": ratios,
                  "tokens_per_step": round(bench.tokens / engine.forwards, 3) if mode.window > 1 else 1.0}


def memory(bench: Bench) -> list[dict[str, Any]]:
    """What sampling was predicted to need beyond the weights, and what a fresh process needed, for the largest of up to 8
    pictures; none for a trained folder or on CUDA, whose weights a child process would load again."""
    options, pictures = bench.options, max((batch for batch in bench.options.batches if batch <= 8), default=None)
    if pictures is None or bench.subject.trained or options.device != "cpu":
        return []
    rows = []
    for guidance in GUIDANCE[options.guidance]:
        say(f"memory, batch {pictures}, guidance {guidance:g}")
        config = bench.subject.model.config
        work = Workload(pictures, pictures, guidance != 1, weights=options.dtype)
        predicted = estimate(config, None, work)
        measured = harness.peak_memory("benchmarks.decode.engines:our_case", {
            "pictures": pictures, "tokens": config.num_tokens, "guidance": guidance, "config": config.model_dump(mode="json"),
            "device": options.device, "dtype": options.dtype}, options.device, options.threads)
        weights, beyond = (round(part / harness.MIB, 2) for part in (predicted.weights, predicted.drawing))
        rows.append({"batch": pictures, "guidance": guidance, "weights_mib": weights, "predicted_mib": beyond,
                     "measured_mib": measured, "of_weights_and_predicted": round((weights + measured) / (weights + beyond), 4)})
    return rows


def _best(timed: dict[str, Timing], peer: str) -> str | None:
    """The fastest variant of a peer, for example of transformers with one cache or another; None if none was timed."""
    variants = [name for name in timed if name.split(",")[0] == peer]
    return min(variants, key=lambda name: statistics.median(timed[name].seconds), default=None)


def measure(options: Options) -> dict[str, Any]:
    """The whole document. With `ok` false nothing has been timed."""
    bench = Bench(options)
    say("the machine's limits")
    limits = measure_limits(options.device, options.dtype)
    document: dict[str, Any] = {
        "benchmark": "decode", "schema_version": 1, "ok": True, "options": options._asdict(),
        "environment": harness.environment(options.device, options.dtype), "peers": bench.peer_facts,
        "limits": {"weight_streaming_gb_per_s": round(limits.bytes_per_s / 1e9, 2),
                   "matmul_gflop_per_s": round(limits.flops_per_s / 1e9, 1)},
        "subject": bench.subject.facts() | {"way": bench.ours[False].way._asdict()},
        "notes": bench.subject.notes()}
    document["verification"] = verification(bench)
    document["ok"] = all(row["ok"] for row in document["verification"])
    document["results"] = speed(bench, limits) if document["ok"] else []
    document["memory"] = memory(bench) if document["ok"] else []
    for key in RATIOS:
        document[key] = {_label(row): row["ratios"][key] for row in document["results"] if key in row["ratios"]}
    document["fraction_of_limit"] = {_label(row): row["fraction_of_limit"] for row in document["results"]
                                     if row["fraction_of_limit"] is not None}
    return document


def _label(row: dict[str, Any]) -> str:
    return f"{row['engine']}, batch {row['batch']}, guidance {'off' if row['guidance'] == 1 else 'on'}"


def show(document: dict[str, Any]) -> None:
    """The table for people."""
    flat = [{**{key: row[key] for key in ("engine", "batch", "guidance", "ms_per_token", "quartile1_s", "quartile3_s",
                                          "tokens_per_step", "fraction_of_limit")},
             **{key.removeprefix("ratio_vs_"): row["ratios"].get(key) for key in RATIOS}} for row in document["results"]]
    if flat:
        print("image tokens, from text ids on (ratios above 1: ours is faster; fraction_of_limit: the machine's least time / "
              "ours)")
        print(command_line.table(flat) + "\n")
    if document["memory"]:
        print("memory beyond the weights (MiB)\n" + command_line.table(document["memory"]) + "\n")
    limits = document["limits"]
    print(f"this machine reads {limits['weight_streaming_gb_per_s']} GB/s and multiplies {limits['matmul_gflop_per_s']} "
          "GFLOP/s")
    for note in document["notes"]:
        print(f"note: {note}")
    for name, facts in document["peers"].items():
        if "missing" in facts:
            print(f"not measured: {name} ({facts['missing']})")


def parse(argv: Sequence[str] | None) -> tuple[Options, str | None]:
    """Options and --out (or --json). UserError for what cannot be measured."""
    parser = command_line.command_parser("decode", __doc__)
    parser.add_argument("--quick", action="store_true", help="a small model, batch 1 and 2, 64 tokens, 3 rounds")
    parser.add_argument("--model", default="reference", help="a model folder, a preset's name, or reference: 57M decoder, 12 "
                        "layers of width 512, 16x16 tokens of 8,192 codes (default)")
    parser.add_argument("--batch", help="pictures at a time (default 1,2,4,8,16,32)")
    parser.add_argument("--tokens", type=int, help="draw the first so many tokens of a picture (default: all)")
    parser.add_argument("--guidance", choices=tuple(GUIDANCE), default="both", help="default both")
    parser.add_argument("--peers", help=f"comma-separated, of {', '.join(repr(name) for name in PEERS)}; none = none (default: "
                        "all but min-dalle, which does dalle-mini's shape alone)")
    parser.add_argument("--jacobi", help="also ours with Jacobi decoding of these windows, for example 8,16 (default: none; it "
                        "needs a trained model to say anything)")
    parser.add_argument("--no-int8", action="store_true", help="leave our 8-bit weights out")
    command_line.add_common_options(parser, "default 3")
    args = parser.parse_args(argv)
    batches = command_line.whole_numbers(args.batch or ("1,2" if args.quick else "1,2,4,8,16,32"), "--batch")
    windows = [] if args.jacobi is None else command_line.whole_numbers(args.jacobi, "--jacobi")
    if 1 in windows:
        raise UserError("--jacobi 1 is plain decoding, which is measured anyway; give 2 or more")
    if args.repeats is not None and args.repeats < 1:
        raise UserError(f"--repeats {args.repeats} must be at least 1")
    harness.start(args.device, args.threads)
    tokens = 64 if args.quick and args.tokens is None else args.tokens
    options = Options(args.quick, args.model, batches, tokens, args.guidance, _peers(args.peers, args.model), windows,
                      not args.no_int8, args.repeats or 3, args.device, args.dtype, torch.get_num_threads())
    return options, args.out


def _peers(given: str | None, model: str) -> list[str]:
    if given is None:
        return ["min-dalle"] if model == "dalle-mini" else list(DEFAULT_PEERS)
    if given == "none":
        return []
    # a peer's name may hold a comma
    names, rest = [], given
    while rest:
        name = max((name for name in PEERS if rest == name or rest.startswith(f"{name},")), key=len, default=None)
        if name is None:
            choose(PEERS, rest.split(",")[0], "peer")
        assert name is not None
        names.append(name)
        rest = rest[len(name) + 1:]
    return names


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, show, write. RunFailedError if an engine does not do the same work."""
    options, name = parse(argv)
    out = command_line.check_output(name)
    document = measure(options)
    show(document)
    command_line.finish(document, out)
    if not document["ok"]:
        wrong = next(row for row in document["verification"] if not row["ok"])
        raise RunFailedError(f"{wrong['engine']} does not do the same work, so nothing was timed: "
                             f"{', '.join(f'{key} {value}' for key, value in wrong.items() if key not in ('ok', 'engine'))}")
    return 0
