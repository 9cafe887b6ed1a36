"""Image tokenizers: speed and peak memory beside diffusers' VQModel, and the cost of our options.

    python -m benchmarks tokenizer --quick                            (under a minute on one core)
    python -m benchmarks tokenizer --threads 2 --out tokenizer.json   (CPU, published size)
    python -m benchmarks tokenizer --device cuda --dtype bfloat16 --batch 1,32 --preset vq-16

diffusers' VQModel has our weights. Nothing is timed before both are seen to do the same work: equal
codes (up to ties) and equal pictures.
"""

# Axes: B batch, S pixels of a side, h w code grid, K codebook size

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import command_line, harness
from benchmarks.harness import Case, Timing, peak_memory, speed_ratio, time_alternating
from benchmarks.peers.diffusers_vq import Peer, peer_version, verify
from benchmarks.tokenizer_cases import (
    large_case,
    make_image,
    make_tokenizer,
    nearest_case,
    sized,
    training_case,
)
from tokenizer_image import VQGAN
from tokenizer_image.config import VQGAN_PRESETS
from tokenloom_common.errors import choose

PEER_NAME = "diffusers VQModel"
STEPS = ("encode", "decode")
BOTH = "encode+decode"
say = partial(command_line.say, "tokenizer")


class Options(NamedTuple):
    """The command line, checked."""

    quick: bool
    preset: str
    batches: list[int]
    resolutions: list[int]
    repeats: int
    device: str
    dtype: str
    threads: int

    def model(self, resolution: int, dtype: str | None = None) -> dict[str, Any]:
        """Return the arguments of `make_tokenizer`, as JSON values."""
        return {"preset": self.preset, "resolution": resolution, "device": self.device,
                "dtype": dtype or self.dtype}

    def peak(self, case: str, arguments: dict[str, Any]) -> float:
        """Measure the peak memory of a case of tokenizer_cases.py in MiB."""
        build = f"benchmarks.tokenizer_cases:{case}"
        return peak_memory(build, arguments, self.device, self.threads)


def verification(options: Options) -> list[dict[str, Any]]:
    """Verify every size that is measured, in float32 whatever is timed."""
    rows = []
    for resolution in options.resolutions:
        ours = make_tokenizer(**options.model(resolution, "float32"))
        peer = Peer(ours)
        for batch in options.batches:
            say(f"same work? {resolution} px, batch {batch}")
            result = verify(ours, peer, make_image(batch, resolution, options.device))
            rows.append({"resolution": resolution, "batch": batch, **result})
    return rows


# ---- encode and decode

def speed(options: Options, with_peer: bool, checked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measure encode, decode and both for every batch and resolution."""
    verdicts = {(row["resolution"], row["batch"]): row for row in checked}
    rows: list[dict[str, Any]] = []
    for resolution in options.resolutions:
        ours = make_tokenizer(**options.model(resolution))
        runners: dict[str, Any] = {"ours": ours}
        if with_peer:
            runners["peer"] = Peer(ours)
        for batch in options.batches:
            say(f"encode and decode: {resolution} px, batch {batch}")
            image = make_image(batch, resolution, options.device, options.dtype)
            timings = _time_steps(runners, image, ours.encode(image), options)
            memory = _step_memory(list(runners), resolution, batch, options)
            verdict = verdicts.get((resolution, batch), {})
            for step in (*STEPS, BOTH):
                row = {"step": step, "resolution": resolution, "batch": batch,
                       "ours": None, "peer": None, "ratio": None,
                       "codes_equal_share": verdict.get("codes_equal_share"),
                       "picture_max_abs_difference": verdict.get("picture_max_abs_difference")}
                for side in runners:
                    row[side] = _figures(timings[step, side], memory[step, side], batch)
                if with_peer:
                    row["ratio"] = speed_ratio(timings[step, "ours"], timings[step, "peer"])
                rows.append(row)
    return rows


def _figures(timing: Timing, peak: float, batch: int) -> dict[str, float]:
    summary = timing.summary()
    return {"images_per_s": round(batch / summary["median_s"], 3), **summary,
            "peak_memory_mib": peak}


def _time_steps(runners: dict[str, Any], image: Tensor, codes: Tensor,
                options: Options) -> dict[tuple[str, str], Timing]:
    """Return (step, side) -> timing; `encode+decode` adds those of the same round."""
    cases: dict[str, Case] = {}
    for side, runner in runners.items():
        cases[f"encode {side}"] = partial(runner.encode, image)
    for side, runner in runners.items():
        cases[f"decode {side}"] = partial(runner.decode, codes)
    timed = time_alternating(cases, options.repeats, options.device)

    timings = {}
    for side in runners:
        encode, decode = timed[f"encode {side}"], timed[f"decode {side}"]
        timings["encode", side], timings["decode", side] = encode, decode
        timings[BOTH, side] = encode.plus(decode)
    return timings


def _step_memory(sides: list[str], resolution: int, batch: int,
                 options: Options) -> dict[tuple[str, str], float]:
    """Return (step, side) -> MiB; `encode+decode` needs the larger of the two."""
    memory = {}
    for step in STEPS:
        for side in sides:
            arguments = {"side": side, "step": step, "batch": batch, **options.model(resolution)}
            memory[step, side] = options.peak("step_case", arguments)
    for side in sides:
        memory[BOTH, side] = max(memory[step, side] for step in STEPS)
    return memory


# ---- options of ours

def tiling(options: Options) -> list[dict[str, Any]]:
    """Measure a large image whole and in tiles."""
    tile = max(options.resolutions)
    side = tile * (3 if options.quick else 4)
    repeats = options.repeats if options.quick else 1  # a full-size round is long
    rows = []
    for step in STEPS:
        say(f"{step} of {side} px, whole and in tiles of {tile}")
        case: dict[str, Any] = {"step": step, "side": side, **options.model(tile)}
        arguments = {"whole": {**case, "tiled": False}, "tiled": {**case, "tiled": True}}
        cases = {way: large_case(**values) for way, values in arguments.items()}
        timed = time_alternating(cases, repeats, options.device, warmup=int(options.quick))
        for way, values in arguments.items():
            rows.append({"step": step, "side": side, "way": way, **timed[way].summary(),
                         "rounds": len(timed[way].seconds),
                         "peak_memory_mib": options.peak("large_case", values)})
    return rows


def nearest(options: Options) -> list[dict[str, Any]]:
    """Measure the quantizer's search in small and large codebooks.

    `share_of_all_scores` near 0: memory does not grow with K.
    """
    latents = 1024
    sizes = (1024, 65_536) if options.quick else (1024, 16_384, 65_536, 262_144)
    say(f"nearest of {', '.join(f'{size:,}' for size in sizes)} codes")
    case = {"preset": options.preset, "latents": latents, "device": options.device}
    arguments: dict[int, dict[str, Any]] = {size: {**case, "codebook_size": size} for size in sizes}
    cases = {str(size): nearest_case(**values) for size, values in arguments.items()}
    timed = time_alternating(cases, options.repeats, options.device)

    rows: list[dict[str, Any]] = []
    for size, values in arguments.items():
        scores = latents * size * 4 / harness.MIB  # float32, if all were held at once
        peak = options.peak("nearest_case", values)
        growth = None
        if rows:  # differences to the first row: what does not depend on K cancels
            more_memory = peak - rows[0]["peak_memory_mib"]
            growth = round(more_memory / (scores - rows[0]["all_scores_mib"]), 3)
        rows.append({"codebook_size": size, "latents": latents, **timed[str(size)].summary(),
                     "peak_memory_mib": peak, "all_scores_mib": round(scores, 2),
                     "share_of_all_scores": growth})
    return rows


def has_checkpointing(model: VQGAN) -> bool:
    """Whether the tokenizer can switch gradient checkpointing."""
    return hasattr(model, "gradient_checkpointing")


def checkpointing(options: Options) -> list[dict[str, Any]]:
    """Measure a float32 training step with gradient checkpointing off and on; [] without it."""
    resolution = max(options.resolutions)
    batch = 4 if options.quick else 1
    model = options.model(resolution, "float32")
    if not has_checkpointing(make_tokenizer(**model)):
        return []

    say(f"training step, {resolution} px, batch {batch}")
    arguments = {name: {"checkpointing": name == "on", "batch": batch, **model}
                 for name in ("off", "on")}
    cases = {name: training_case(**values) for name, values in arguments.items()}
    timed = time_alternating(cases, min(options.repeats, 3), options.device)
    return [{"checkpointing": name, "resolution": resolution, "batch": batch,
             **timed[name].summary(), "peak_memory_mib": options.peak("training_case", values)}
            for name, values in arguments.items()]


# ---- the command

def measure(options: Options) -> dict[str, Any]:
    """Return the whole document. If its `ok` is false, nothing has been timed."""
    version = peer_version()
    document: dict[str, Any] = {
        "benchmark": "tokenizer", "schema_version": 1, "ok": True, "options": options._asdict(),
        "environment": harness.environment(options.device, options.dtype),
        "peer": None, "notes": []}
    if version is None:
        document["peer_missing"] = "pip install diffusers"
        document["notes"].append("no peer: diffusers cannot be imported; our own rows only")
    else:
        document["peer"] = {"name": PEER_NAME, "version": version}

    # no peer: nothing to verify against, so that `ok` is true and ours alone is measured
    document["verification"] = verification(options) if version else []
    document["ok"] = all(row["ok"] for row in document["verification"])
    if not document["ok"]:
        return document | {"rows": [], "tiling": [], "nearest": [], "gradient_checkpointing": []}

    document["rows"] = speed(options, version is not None, document["verification"])
    document["tiling"] = tiling(options)
    document["nearest"] = nearest(options)
    document["gradient_checkpointing"] = checkpointing(options)
    if not document["gradient_checkpointing"]:
        document["notes"].append("no gradient checkpointing rows: this tokenizer has no attribute "
                                 "gradient_checkpointing")
    return document


def show(document: dict[str, Any]) -> None:
    """Print the tables and the notes."""
    sides = ("ours", "peer")
    flat = []
    for row in document["rows"]:
        line = {key: value for key, value in row.items() if key not in sides}
        for key in ("images_per_s", "peak_memory_mib"):
            line |= {f"{side} {key}": row[side] and row[side][key] for side in sides}
        flat.append(line)

    tables = {"ours and the peer (ratio above 1: ours is faster)": flat,
              "a large picture": document["tiling"], "nearest code": document["nearest"],
              "gradient checkpointing": document["gradient_checkpointing"]}
    for title, rows in tables.items():
        if rows:
            print(f"{title}\n{command_line.table(rows)}\n")
    for note in document["notes"]:
        print(f"note: {note}")


def parse(argv: Sequence[str] | None) -> tuple[Options, str | None]:
    """Parse the options and --out. UserError for what cannot be measured."""
    parser = command_line.command_parser("tokenizer", __doc__)
    parser.add_argument("--quick", action="store_true",
                        help="other defaults: debug preset, batch 2, 32 px")
    names = ", ".join(VQGAN_PRESETS)
    parser.add_argument("--preset", help=f"one of {names} (default vqgan-f16-1024)")
    parser.add_argument("--batch", help="batch sizes (default 1,8)")
    parser.add_argument("--resolution", help="pixels of a side (default 128,256)")
    command_line.add_common_options(parser, "default 5; quick 9")
    args = parser.parse_args(argv)

    defaults: dict[str, Any] = {"preset": "vqgan-f16-1024", "batch": "1,8", "resolution": "128,256",
                                "repeats": 5}
    if args.quick:
        defaults = {"preset": "debug", "batch": "2", "resolution": "32", "repeats": 9}
    command_line.fill_in(args, defaults, {"repeats": 1})

    harness.start(args.device, args.threads)
    config = choose(VQGAN_PRESETS, args.preset, "preset")
    resolutions = command_line.whole_numbers(args.resolution, "--resolution")
    for resolution in resolutions:
        sized(config, resolution)  # refuses what the downsampling factor does not divide
    batches = command_line.whole_numbers(args.batch, "--batch")
    options = Options(args.quick, args.preset, batches, resolutions, args.repeats, args.device,
                      args.dtype, torch.get_num_threads())
    return options, args.out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. RunFailedError if ours and the peer do not do the same work."""
    options, out = parse(argv)
    return command_line.run_benchmark(lambda: measure(options), show, out, PEER_NAME)
