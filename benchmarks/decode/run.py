"""Image token sampling: ours, x-transformers, transformers and min-dalle, and the machine's limit.

    python -m benchmarks decode --quick                          (half a minute on two cores)
    python -m benchmarks decode --threads 2 --json decode.json   (CPU, 54.5M decoder; half an hour)
    python -m benchmarks decode --model demo/model --jacobi 8,16 --batch 1       (a trained model)
    python -m benchmarks decode --model dalle-mini --peers min-dalle --tokens 64 --guidance on
    python -m benchmarks decode --device cuda --dtype bfloat16 --model parti-750m --batch 1,8,32

One run: the same random weights in ours, x-transformers and min-dalle (transformers' BART has as
many per layer), all engines in turn, in alternating order. Nothing is timed before each engine has
been seen to do the same work. Every case begins with text ids and ends with tokens: the text
encoder, the cache and top-k sampling are part of it.

Axes: B images, R rows (B, or 2B with guidance), s tokens sampled.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks import command_line, harness
from benchmarks.decode import document as documents
from benchmarks.decode.document import RATIOS, fastest_variant
from benchmarks.decode.engines import Mode, OurEngine
from benchmarks.decode.limits import Limits, measure_limits, step_cost
from benchmarks.decode.options import GUIDANCE, UNCACHED, Options, parse
from benchmarks.decode.peers import Peer, make_peer, missing, peer_version
from benchmarks.decode.reference import Work
from benchmarks.decode.subject import Subject, subject_of
from benchmarks.harness import Case, Timing, speed_ratio, time_alternating
from inference.memory.estimate import Workload, estimate
from tokenloom_common.errors import RunFailedError, UserError

LARGEST_MEMORY_BATCH = 8


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"benchmarks decode: {text}", file=sys.stderr, flush=True)


class Bench:
    """Everything that a run needs, built once: the subject, our engines, the installed peers."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.subject: Subject = subject_of(
            options.model, options.quick, options.device, options.dtype)
        num_tokens = self.subject.model.config.num_tokens
        self.tokens = options.tokens or num_tokens
        if not 1 <= self.tokens <= num_tokens:
            raise UserError(f"--tokens {self.tokens}: a picture of this model has {num_tokens}")

        self.modes = [Mode()]
        if options.int8:
            self.modes.append(Mode(int8=True))
        self.modes += [Mode(window=window) for window in options.jacobi]
        precisions = {mode.int8 for mode in self.modes}
        self.ours = {int8: OurEngine(self.subject.model, int8) for int8 in precisions}

        self.peers: dict[str, Peer] = {}
        self.peer_facts: dict[str, dict[str, Any]] = {}
        for name in options.peers:
            self._add_peer(name)

    def _add_peer(self, name: str) -> None:
        reason = missing(name)
        if reason is None:
            try:
                self.peers[name] = make_peer(name, self.subject.peer_model(name))
            except ValueError as error:  # the peer cannot express the model
                reason = str(error)
        if reason is not None:
            self.peer_facts[name] = {"missing": reason}
            say(f"{name}: left out: {reason}")
            return

        facts: dict[str, Any] = {"version": peer_version(name)}
        if self.subject.peer_shape_differs(name):
            facts["weights"] = ("its own, of the same shape, with rotary 1d in place of 2d, "
                                "which it does not have")
        peer: Any = self.peers[name]
        if hasattr(peer, "layer_parameters"):
            facts["layer_parameters"] = peer.layer_parameters
            facts["our_layer_parameters"] = peer.our_layer_parameters
        self.peer_facts[name] = facts

    def work(self, pictures: int, guidance: float, one_caption: bool = False) -> Work:
        """The work of `pictures` images; the same captions for every engine."""
        return self.subject.work(pictures, self.tokens, guidance, one_caption)

    def cases(self, pictures: int, guidance: float) -> dict[str, Case]:
        """Our engine in each mode, then the peers that can do this work."""
        one_caption = any(peer.one_caption for peer in self.peers.values())
        work = self.work(pictures, guidance, one_caption)
        cases: dict[str, Case] = {}
        for mode in self.modes:
            cases[mode.name] = partial(self.ours[mode.int8].sample, work, mode.window)
        for name, peer in self.peers.items():
            if peer.one_caption and guidance == 1:
                continue  # min-dalle always guides
            if name == UNCACHED and pictures > 1:
                continue  # it is slow, and one image shows it
            cases[name] = partial(peer.sample, work)
        return cases


def verification(bench: Bench) -> list[dict[str, Any]]:
    """Compare every engine with the training graph, in float32, on a small copy of the subject."""
    rows = []
    small = bench.subject.small_model()
    for int8 in bench.ours:
        name = Mode(int8=int8).name
        engine = OurEngine(small, int8)
        for guidance in (1.0, 3.0):
            say(f"same work? {name}, guidance {guidance:g}")
            work = bench.subject.small_work(small, guidance)
            rows.append({"engine": name} | engine.verify(small, work))
    for name in bench.peers:
        say(f"same work? {name}")
        rows.append({"engine": name} | bench.subject.verify_peer(name, small))
    return rows


def speed(bench: Bench, limits: Limits) -> list[dict[str, Any]]:
    """One row per engine, batch and guidance; the engines of a batch take turns."""
    rows = []
    for guidance in GUIDANCE[bench.options.guidance]:
        for pictures in bench.options.batches:
            say(f"batch {pictures}, guidance {guidance:g}")
            cases = bench.cases(pictures, guidance)
            timed = time_alternating(cases, bench.options.repeats, bench.options.device)
            for name in timed:
                row = _row(bench, limits, name, pictures, guidance, timed)
                say(f"  {name}: {row['ms_per_token']:.2f} ms a token")
                rows.append(row)
    return rows


def _row(bench: Bench, limits: Limits, name: str, pictures: int, guidance: float,
         timed: dict[str, Timing]) -> dict[str, Any]:
    timing = timed[name]
    seconds = statistics.median(timing.seconds)
    row_count = pictures * (1 if guidance == 1 else 2)
    row: dict[str, Any] = {
        "engine": name, "batch": pictures, "guidance": guidance, "rows": row_count,
        "tokens": bench.tokens,
        **timing.summary(),
        "ms_per_token": round(1e3 * seconds / bench.tokens, 4),
        "pictures_per_s": round(pictures / seconds, 4),
        "fraction_of_limit": None, "tokens_per_step": None, "ratios": {}}
    mode = next((mode for mode in bench.modes if mode.name == name), None)
    if mode is None:  # a peer
        return row

    engine = bench.ours[mode.int8]
    for key, peer in RATIOS.items():
        variant = fastest_variant(timed, peer)
        if variant is not None:
            row["ratios"][key] = speed_ratio(timing, timed[variant])
    if mode.window > 1:
        engine.sample(bench.work(pictures, guidance), mode.window)  # for its number of steps
        row["tokens_per_step"] = round(bench.tokens / engine.forwards, 3)
    else:
        text_slots = bench.subject.caption_slots(pictures)
        cost = step_cost(engine.decoder, row_count, bench.tokens, text_slots)
        row["tokens_per_step"] = 1.0
        row["fraction_of_limit"] = round(cost.seconds(limits) / (seconds / bench.tokens), 4)
    return row


def memory(bench: Bench) -> list[dict[str, Any]]:
    """Memory beyond the weights, predicted and measured, for the largest batch of up to 8 images.

    Measured in a fresh process. Empty for a trained folder, whose weights that process would load
    again, and on CUDA.
    """
    options = bench.options
    batches = [batch for batch in options.batches if batch <= LARGEST_MEMORY_BATCH]
    if not batches or bench.subject.trained or options.device != "cpu":
        return []

    pictures = max(batches)
    config = bench.subject.model.config
    rows = []
    for guidance in GUIDANCE[options.guidance]:
        say(f"memory, batch {pictures}, guidance {guidance:g}")
        workload = Workload(pictures, pictures, guidance != 1, weights=options.dtype)
        predicted = estimate(config, None, workload)
        arguments = {
            "pictures": pictures, "tokens": config.num_tokens, "guidance": guidance,
            "config": config.model_dump(mode="json"), "device": options.device,
            "dtype": options.dtype}
        measured = harness.peak_memory(
            "benchmarks.decode.engines:our_case", arguments, options.device, options.threads)
        weights = round(predicted.weights / harness.MIB, 2)
        beyond = round(predicted.drawing / harness.MIB, 2)
        rows.append({
            "batch": pictures, "guidance": guidance, "weights_mib": weights,
            "predicted_mib": beyond, "measured_mib": measured,
            "of_weights_and_predicted": round((weights + measured) / (weights + beyond), 4)})
    return rows


def measure(options: Options) -> dict[str, Any]:
    """Build the whole document. If its `ok` is false, nothing has been timed."""
    bench = Bench(options)
    say("the machine's limits")
    limits = measure_limits(options.device, options.dtype)
    document: dict[str, Any] = {
        "benchmark": "decode", "schema_version": 1, "ok": True, "options": options._asdict(),
        "environment": harness.environment(options.device, options.dtype),
        "peers": bench.peer_facts,
        "limits": {"weight_streaming_gb_per_s": round(limits.bytes_per_s / 1e9, 2),
                   "matmul_gflop_per_s": round(limits.flops_per_s / 1e9, 1)},
        "subject": bench.subject.facts() | {"way": bench.ours[False].matmul._asdict()},
        "notes": bench.subject.notes()}
    document["verification"] = verification(bench)
    document["ok"] = all(row["ok"] for row in document["verification"])
    document["results"] = speed(bench, limits) if document["ok"] else []
    document["memory"] = memory(bench) if document["ok"] else []
    return document | documents.summaries(document["results"])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. RunFailedError if an engine does not do the same work."""
    options, name = parse(argv, __doc__)
    out = command_line.check_output(name)
    document = measure(options)
    documents.show(document)
    command_line.finish(document, out)
    if not document["ok"]:
        wrong = next(row for row in document["verification"] if not row["ok"])
        engine = wrong.pop("engine")
        found = ", ".join(f"{key} {value}" for key, value in wrong.items() if key != "ok")
        raise RunFailedError(f"{engine} does not do the same work, so nothing was timed: {found}")
    return 0
