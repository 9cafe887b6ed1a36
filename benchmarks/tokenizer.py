"""Image tokenizers: speed and peak memory beside diffusers' VQModel with the same weights, and what our own options cost.

    python -m benchmarks tokenizer --quick                                              (under a minute on one core)
    python -m benchmarks tokenizer --threads 2 --out tokenizer.json                     (CPU, published size)
    python -m benchmarks tokenizer --device cuda --dtype bfloat16 --batch 1,32 --preset vq-16

Nothing is timed before ours and the peer have been seen to do the same work: equal codes (up to ties) and equal pictures.

Axes: B batch, S pixels of a side, h w code grid, K codebook size.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Case, Timing, peak_memory, speed_ratio, time_alternating
from benchmarks.peers.diffusers_vq import Peer, peer_version, verify
from benchmarks.tokenizer_cases import large_case, make_image, make_tokenizer, nearest_case, sized
from tokenizer_image import VQGAN
from tokenizer_image.config import VQGAN_PRESETS
from tokenloom_common.errors import UserError, choose

PEER_NAME = "diffusers VQModel"
THIS = "benchmarks.tokenizer"


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
        """Arguments of `make_tokenizer`, as JSON values, so that a child process builds the same one."""
        return {"preset": self.preset, "resolution": resolution, "device": self.device, "dtype": dtype or self.dtype}

    def peak(self, function: str, arguments: dict[str, Any]) -> float:
        """Peak memory of a case of this file, MiB."""
        return peak_memory(f"{THIS}:{function}", arguments, self.device, self.threads)


# ---- cases: each function takes JSON values, builds what it needs and gives what is measured


def training_case(checkpointing: bool, batch: int, **model: Any) -> Case:
    """Forward and backward of one training step without an optimizer; room for the gradients is there before it."""
    tokenizer = make_tokenizer(**model).train()
    for parameter in tokenizer.parameters():
        parameter.grad = torch.full_like(parameter, 0.0)
    tokenizer.gradient_checkpointing = checkpointing
    image = make_image(batch, model["resolution"], model["device"], model["dtype"])

    def step() -> None:
        result = tokenizer(image)
        loss = F.l1_loss(result.reconstruction, image) + sum(part.value * part.weight for part in result.losses.values())
        tokenizer.zero_grad(set_to_none=False)
        loss.backward()

    return step


# ---- measuring

def verification(options: Options) -> list[dict[str, Any]]:
    """`verify` for every size that is measured, in float32 whatever is timed."""
    rows = []
    for resolution in options.resolutions:
        ours = make_tokenizer(**options.model(resolution, "float32"))
        peer = Peer(ours)
        for batch in options.batches:
            say(f"same work? {resolution} px, batch {batch}")
            result = verify(ours, peer, make_image(batch, resolution, options.device))
            rows.append({"resolution": resolution, "batch": batch, **result})
    return rows


def speed(options: Options, with_peer: bool, checked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of encode, decode and both, for every batch and resolution."""
    rows: list[dict[str, Any]] = []
    sides = ("ours", "peer") if with_peer else ("ours",)
    for resolution in options.resolutions:
        ours = make_tokenizer(**options.model(resolution))
        runners = {"ours": ours, **({"peer": Peer(ours)} if with_peer else {})}
        for batch in options.batches:
            say(f"encode and decode: {resolution} px, batch {batch}")
            image = make_image(batch, resolution, options.device, options.dtype)
            timings = _time_steps(runners, image, ours.encode(image), options)
            memory = {(step, side): options.peak("step_case", {"side": side, "step": step, "batch": batch,
                                                               **options.model(resolution)})
                      for step in ("encode", "decode") for side in sides}
            same = next((row for row in checked if (row["resolution"], row["batch"]) == (resolution, batch)), {})
            for step in ("encode", "decode", "encode+decode"):
                parts = step.split("+")
                row = {"step": step, "resolution": resolution, "batch": batch, "ours": None, "peer": None, "ratio": None,
                       **{key: same.get(key) for key in ("codes_equal_share", "picture_max_abs_difference")}}
                for side in sides:
                    timing = timings[step, side]
                    row[side] = {"images_per_s": round(batch / timing.summary()["median_s"], 3), **timing.summary(),
                                 "peak_memory_mib": max(memory[part, side] for part in parts)}
                if with_peer:
                    row["ratio"] = speed_ratio(timings[step, "ours"], timings[step, "peer"])
                rows.append(row)
    return rows


def _time_steps(runners: dict[str, Any], image: Tensor, codes: Tensor, options: Options) -> dict[tuple[str, str], Timing]:
    """(step, side) -> timing; `encode+decode` is one after the other, of the same round."""
    cases: dict[tuple[str, str], Case] = {}
    for side, runner in runners.items():
        cases["encode", side] = lambda runner=runner: runner.encode(image)  # type: ignore[misc]
        cases["decode", side] = lambda runner=runner: runner.decode(codes)  # type: ignore[misc]
    ordered = {f"{step} {side}": cases[step, side] for step in ("encode", "decode") for side in runners}
    timed = time_alternating(ordered, options.repeats, options.device)
    result = {key: timed[" ".join(key)] for key in cases}
    return result | {("encode+decode", side): result["encode", side].plus(result["decode", side]) for side in runners}


def tiling(options: Options) -> list[dict[str, Any]]:
    """A large picture whole and in tiles."""
    tile = max(options.resolutions)
    side = tile * (3 if options.quick else 4)
    rows = []
    for step in ("encode", "decode"):
        say(f"{step} of {side} px, whole and in tiles of {tile}")
        arguments = {way: {"step": step, "tiled": way == "tiled", "side": side, **options.model(tile)}
                     for way in ("whole", "tiled")}
        timed = time_alternating({way: large_case(**values) for way, values in arguments.items()},
                                 options.repeats if options.quick else 1, options.device, warmup=int(options.quick))
        rows += [{"step": step, "side": side, "way": way, **timed[way].summary(), "rounds": len(timed[way].seconds),
                  "peak_memory_mib": options.peak("large_case", values)} for way, values in arguments.items()]
    return rows


def nearest(options: Options) -> list[dict[str, Any]]:
    """The quantizer's search in small and large codebooks; `share_of_all_scores` near 0: memory does not grow with K."""
    sizes, latents = (1024, 65_536) if options.quick else (1024, 16_384, 65_536, 262_144), 1024
    say(f"nearest of {', '.join(f'{size:,}' for size in sizes)} codes")
    arguments: dict[int, dict[str, Any]] = {size: {"preset": options.preset, "codebook_size": size, "latents": latents,
                                                   "device": options.device} for size in sizes}
    timed = time_alternating({str(size): nearest_case(**values) for size, values in arguments.items()}, options.repeats,
                             options.device)
    rows: list[dict[str, Any]] = []
    for size, values in arguments.items():
        scores = latents * size * 4 / harness.MIB
        peak = options.peak("nearest_case", values)
        first = rows[0] if rows else None
        growth = None if first is None else round((peak - first["peak_memory_mib"]) / (scores - first["all_scores_mib"]), 3)
        rows.append({"codebook_size": size, "latents": latents, **timed[str(size)].summary(), "peak_memory_mib": peak,
                     "all_scores_mib": round(scores, 2), "share_of_all_scores": growth})
    return rows


def has_checkpointing(model: VQGAN) -> bool:
    """Whether the tokenizer has the switch."""
    return hasattr(model, "gradient_checkpointing")


def checkpointing(options: Options) -> list[dict[str, Any]]:
    """A training step with gradient checkpointing off and on, in float32; empty where the tokenizer has no such switch."""
    resolution, batch = max(options.resolutions), 4 if options.quick else 1
    model = options.model(resolution, "float32")
    if not has_checkpointing(make_tokenizer(**model)):
        return []
    say(f"training step, {resolution} px, batch {batch}")
    arguments = {name: {"checkpointing": name == "on", "batch": batch, **model} for name in ("off", "on")}
    timed = time_alternating({name: training_case(**values) for name, values in arguments.items()}, min(options.repeats, 3),
                             options.device)
    return [{"checkpointing": name, "resolution": resolution, "batch": batch, **timed[name].summary(),
             "peak_memory_mib": options.peak("training_case", values)} for name, values in arguments.items()]


# ---- the command

def say(text: str) -> None:
    """A line of progress."""
    print(f"benchmarks tokenizer: {text}", file=sys.stderr, flush=True)


def measure(options: Options) -> dict[str, Any]:
    """The whole document. With `ok` false nothing has been timed."""
    version = peer_version()
    document: dict[str, Any] = {
        "benchmark": "tokenizer", "schema_version": 1, "ok": True, "options": options._asdict(),
        "environment": harness.environment(options.device, options.dtype), "peer": None, "notes": []}
    if version is None:
        document["peer_missing"] = "pip install diffusers"
        document["notes"].append("no peer: diffusers cannot be imported; our own rows only")
    else:
        document["peer"] = {"name": PEER_NAME, "version": version}
    document["verification"] = verification(options) if version else []
    document["ok"] = all(row["ok"] for row in document["verification"])
    parts = {"rows": lambda: speed(options, version is not None, document["verification"]), "tiling": lambda: tiling(options),
             "nearest": lambda: nearest(options), "gradient_checkpointing": lambda: checkpointing(options)}
    for name, part in parts.items():
        document[name] = part() if document["ok"] else []
    if document["ok"] and not document["gradient_checkpointing"]:
        document["notes"].append("no gradient checkpointing rows: this tokenizer has no attribute gradient_checkpointing")
    return document


def show(document: dict[str, Any]) -> None:
    """The tables for people."""
    keys = ("images_per_s", "peak_memory_mib")
    sides = ("ours", "peer")
    flat = [{**{key: value for key, value in row.items() if key not in sides},
             **{f"{side} {key}": row[side] and row[side][key] for key in keys for side in sides}} for row in document["rows"]]
    tables = {"ours and the peer (ratio above 1: ours is faster)": flat, "a large picture": document["tiling"],
              "nearest code": document["nearest"], "gradient checkpointing": document["gradient_checkpointing"]}
    for title, rows in tables.items():
        if rows:
            print(f"{title}\n{harness.table(rows)}\n")
    for note in document["notes"]:
        print(f"note: {note}")


def parse(argv: Sequence[str] | None) -> tuple[Options, str | None]:
    """Options and --out. UserError for what cannot be measured."""
    parser = harness.command_parser("tokenizer", __doc__)
    parser.add_argument("--quick", action="store_true", help="other defaults: debug preset, batch 2, 32 px")
    parser.add_argument("--preset", help=f"one of {', '.join(VQGAN_PRESETS)} (default vqgan-f16-1024)")
    parser.add_argument("--batch", help="batch sizes (default 1,8)")
    parser.add_argument("--resolution", help="pixels of a side (default 128,256)")
    harness.add_common_options(parser, "default 5; quick 9")
    args = parser.parse_args(argv)
    preset, batch, resolution, repeats = ("debug", "2", "32", 9) if args.quick else ("vqgan-f16-1024", "1,8", "128,256", 5)
    repeats = repeats if args.repeats is None else args.repeats
    if repeats < 1:
        raise UserError(f"--repeats {repeats} must be at least 1")
    harness.start(args.device, args.threads)
    preset = preset if args.preset is None else args.preset
    config = choose(VQGAN_PRESETS, preset, "preset")
    sides = harness.whole_numbers(resolution if args.resolution is None else args.resolution, "--resolution")
    for side in sides:
        sized(config, side)
    return Options(args.quick, preset, harness.whole_numbers(batch if args.batch is None else args.batch, "--batch"), sides,
                   repeats, args.device, args.dtype, torch.get_num_threads()), args.out


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, show, write. RunFailedError if ours and the peer do not do the same work."""
    options, name = parse(argv)
    out = harness.check_output(name)
    document = measure(options)
    show(document)
    harness.finish(document, out)
    harness.require_same_work(document, PEER_NAME)
    return 0
