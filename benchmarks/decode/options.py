"""Options of `benchmarks decode`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from benchmarks import command_line, harness
from benchmarks.decode.peers import PEERS
from tokenloom_common.errors import UserError, choose

GUIDANCE = {"on": (3.0,), "off": (1.0,), "both": (1.0, 3.0)}
UNCACHED = "x-transformers, no cache"
DEFAULT_PEERS = ("x-transformers", UNCACHED, "transformers", "transformers, static cache")


class Options(NamedTuple):
    """Everything that decides a measurement; written to the document as JSON."""

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


def parse(argv: Sequence[str] | None, description: str | None = None) -> tuple[Options, str | None]:
    """Return the options and --out (or --json). UserError for options that cannot be measured."""
    parser = command_line.command_parser("decode", description)
    parser.add_argument("--quick", action="store_true",
                        help="a small model, batch 1 and 2, 64 tokens, 3 rounds")
    parser.add_argument("--model", default="reference",
                        help="a model folder, a preset's name, or reference: 54.5M decoder, 12 "
                             "layers of width 512, 16x16 tokens of 8,192 codes (default)")
    parser.add_argument("--batch", help="pictures at a time (default 1,2,4,8,16,32)")
    parser.add_argument("--tokens", type=int,
                        help="draw only the first so many tokens of a picture (default: all)")
    parser.add_argument("--guidance", choices=tuple(GUIDANCE), default="both", help="default both")
    names = ", ".join(repr(name) for name in PEERS)
    parser.add_argument("--peers",
                        help=f"comma-separated, of {names}; none = none (default: all but "
                             "min-dalle, which can only be a model of dalle-mini's shape)")
    parser.add_argument("--jacobi",
                        help="also ours with Jacobi decoding of these windows, for example 8,16 "
                             "(default: none; meaningful with a trained model only)")
    parser.add_argument("--no-int8", action="store_true", help="leave our 8-bit weights out")
    command_line.add_common_options(parser, "default 3")
    args = parser.parse_args(argv)

    default_batches = "1,2" if args.quick else "1,2,4,8,16,32"
    batches = command_line.whole_numbers(args.batch or default_batches, "--batch")
    windows = [] if args.jacobi is None else command_line.whole_numbers(args.jacobi, "--jacobi")
    if 1 in windows:
        raise UserError("--jacobi 1 is plain decoding, which is measured anyway; give 2 or more")
    if args.repeats is not None and args.repeats < 1:
        raise UserError(f"--repeats {args.repeats} must be at least 1")

    harness.start(args.device, args.threads)
    options = Options(
        quick=args.quick,
        model=args.model,
        batches=batches,
        tokens=64 if args.quick and args.tokens is None else args.tokens,
        guidance=args.guidance,
        peers=_peer_names(args.peers, args.model),
        jacobi=windows,
        int8=not args.no_int8,
        repeats=args.repeats or 3,
        device=args.device,
        dtype=args.dtype,
        threads=torch.get_num_threads())
    return options, args.out


def _peer_names(given: str | None, model: str) -> list[str]:
    if given is None:
        return ["min-dalle"] if model == "dalle-mini" else list(DEFAULT_PEERS)
    if given == "none":
        return []

    # a peer's name may hold a comma: take the longest name that the rest begins with
    names = []
    rest = given
    while rest:
        fitting = [name for name in PEERS if rest == name or rest.startswith(f"{name},")]
        if not fitting:
            choose(PEERS, rest.split(",")[0], "peer")  # raises, with the nearest name
        name = max(fitting, key=len)
        names.append(name)
        rest = rest[len(name) + 1:]
    return names
