"""Serving: requests that share a batch beside single `generate` calls, latencies, first partial.

Server and loop draw the same images of the same seeds, compared before anything is timed; both run
in this process and take turns. The model has random weights unless one is named.

examples:
  python -m benchmarks serving --quick
  python -m benchmarks serving --model demo/model --requests 32 --threads 2 --out serving.json
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import command_line, harness
from benchmarks.serving_cases import (
    SHAPES,
    Client,
    make_model,
    one_after_another,
    quarter_of_the_tokens,
    served,
)
from inference.pipeline import TextToImage
from tokenloom_common.errors import UserError
from tokenloom_common.extras import require_extra


class Options(NamedTuple):
    """The command line, checked."""

    quick: bool
    model: str | None
    requests: int
    rows: int
    repeats: int
    threads: int
    device: str


def measure(options: Options) -> dict[str, Any]:
    """Return the document."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(options.model or make_model(Path(name) / "model", SHAPES[options.quick]))
        model = TextToImage.from_pretrained(folder, device=options.device)
        with served(folder, options.rows, options.device) as client:
            return _measure(options, model, client)


def _measure(options: Options, model: TextToImage, client: Client) -> dict[str, Any]:
    requests = options.requests
    equal = client.flood(requests) == one_after_another(model, requests)
    document: dict[str, Any] = {
        "benchmark": "serving", "schema_version": 1, "ok": equal, "options": options._asdict(),
        "environment": harness.environment(options.device, "float32"),
        "versions": {name: _version(name) for name in ("starlette", "uvicorn")},
        "tokens": model.seq2seq.config.num_tokens,
        "verification": [{"check": "images of the server and of generate", "requests": requests,
                          "ok": equal}]}
    if not equal:
        return document

    command_line.say("serving", f"{requests} requests at once and one after another")
    client.seconds.clear()
    timings = harness.time_alternating(
        {"server": lambda: client.flood(requests),
         "loop": lambda: one_after_another(model, requests)},
        options.repeats, options.device, warmup=0)
    queued = list(client.seconds)
    document["throughput"] = [
        {"candidate": name, "images_per_s": round(requests / timing.summary()["median_s"], 3),
         **timing.summary()} for name, timing in timings.items()]
    document["ratio"] = harness.speed_ratio(timings["server"], timings["loop"])
    document["latency"] = [{"server": "queued", **_percentiles(queued)},
                           {"server": "idle", **_percentiles(_idle(client, options.repeats))}]
    document["first_partial"] = _first_partial(options, model, client)
    return document


def _version(name: str) -> str:
    return str(require_extra(name, "this benchmark", "serve").__version__)


def _idle(client: Client, repeats: int) -> list[float]:
    """Seconds of requests that find nothing else to be drawn."""
    client.seconds.clear()
    for seed in range(4 * repeats):
        client.draw(seed)
    return list(client.seconds)


def _first_partial(options: Options, model: TextToImage, client: Client) -> dict[str, Any]:
    """Seconds to the first partial image, beside those of a quarter of the tokens by themselves."""
    def settled() -> None:
        client.first_partial(0)
        time.sleep(0.1)  # the rest of the image is dropped meanwhile

    settled()
    quarter_of_the_tokens(model, 0)
    seconds: dict[str, list[float]] = {"server": [], "quarter": []}
    for name in harness.in_turns(seconds, 4 * options.repeats):
        start = time.perf_counter()
        if name == "server":
            client.first_partial(1)
        else:
            quarter_of_the_tokens(model, 1)
        seconds[name].append(time.perf_counter() - start)
        time.sleep(0.1)
    rounds = zip(seconds["server"], seconds["quarter"], strict=True)
    return {"first_partial_s": round(statistics.median(seconds["server"]), 5),
            "quarter_of_tokens_s": round(statistics.median(seconds["quarter"]), 5),
            "ratio": round(statistics.median(ours / least for ours, least in rounds), 3)}


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return p50, p95 and p99 in seconds: the smallest value that so many are not above."""
    ordered = sorted(seconds)

    def at(percent: int) -> float:
        position = -(-percent * len(ordered) // 100) - 1
        return round(ordered[max(0, position)], 4)

    return {"requests": len(ordered), "p50_s": at(50), "p95_s": at(95), "p99_s": at(99)}


# ---- the command

def show(document: dict[str, Any]) -> None:
    """Print the tables."""
    if not document["ok"]:
        return
    print(f"{command_line.table(document['throughput'])}\n")
    print(f"server / loop: {document['ratio']:.2f} x the images a second\n")
    print(f"{command_line.table(document['latency'])}\n")
    print(f"{command_line.table([document['first_partial']])}\n")


def parse(argv: Sequence[str] | None) -> tuple[Options, str | None]:
    """Parse the options and --out. UserError for what cannot be measured."""
    parser = command_line.command_parser("serving", __doc__)
    parser.add_argument("--quick", action="store_true",
                        help="a tiny model, 8 requests, 1 round, unless given")
    parser.add_argument("--model", help="model folder (default: random weights of the demo's size)")
    parser.add_argument("--requests", type=int, help="sent at once (default 32; quick 8)")
    parser.add_argument("--rows", type=int, default=32,
                        help="of the server's batch, two for a guided picture (default 32)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    command_line.add_run_options(parser, "default 5; quick 1")
    args = parser.parse_args(argv)

    defaults = {"requests": 32, "repeats": 5}
    if args.quick:
        defaults = {"requests": 8, "repeats": 1}
    command_line.fill_in(args, defaults, {"requests": 1, "rows": 2, "repeats": 1})
    if args.requests > 1024:
        raise UserError(f"--requests {args.requests} must be at most 1024")
    for package in ("starlette", "uvicorn", "prometheus_client"):
        require_extra(package, "this benchmark", "serve")
    harness.start(args.device, args.threads)
    options = Options(args.quick, args.model, args.requests, args.rows, args.repeats,
                      torch.get_num_threads(), args.device)
    return options, args.out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark. RunFailedError if server and loop do not draw the same images."""
    options, out = parse(argv)
    return command_line.run_benchmark(lambda: measure(options), show, out, "generate")
