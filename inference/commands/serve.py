"""`tokenloom serve`: its options, and every check that needs no torch."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from inference.commands.hook_options import add_hook_options, checked_safety
from inference.commands.options import MAX_THREADS, WEIGHTS, command_parser
from tokenloom_common.errors import MissingFileError, OneLineParser, UserError
from tokenloom_common.extras import require_extra

PACKAGES = ("starlette", "uvicorn", "prometheus_client")
BOUNDS = {"port": (0, 65_535), "rows": (1, 4096), "queue": (1, 10_000), "deadline": (1, 86_400),
          "max_n": (1, 10), "threads": (1, MAX_THREADS)}
"""Option -> its least and its largest value."""


def serve(argv: Sequence[str] | None = None) -> int:
    """Answer HTTP requests until a signal; 0 once all that was being drawn is done."""
    args = _parser().parse_args(argv)
    _check_numbers(args)
    for package in PACKAGES:
        require_extra(package, "tokenloom serve", "serve")
    from inference.serving.auth import check_key_needed, read_key  # imports starlette

    key = read_key(args.api_key_file)
    check_key_needed(args.host, key)
    if args.text_encoder is not None and args.models is not None:
        raise UserError("--text-encoder is of one model; serve that one without --models")
    if args.models is not None and not Path(args.models).is_dir():
        raise MissingFileError(f"--models {args.models}: no such folder")
    listening = _bind(args.host, args.port)  # before seconds of imports
    try:
        from inference.memory.sizes import bytes_of  # imports torch, as all that follows
        from inference.serving.engine.models import ModelOptions
        from inference.serving.limits import Limits
        from inference.serving.start import ServeOptions, serve_until_stopped
        from tokenloom_common.devices import choose_device

        limits = Limits(max_n=args.max_n, queue=args.queue, deadline=args.deadline)
        memory = None if args.memory is None else bytes_of(args.memory)
        loading = ModelOptions(rows=args.rows, memory=memory, device=choose_device(args.device),
                               weights=args.weights, text_encoder=args.text_encoder)
        options = ServeOptions(
            args.model, None if args.models is None else Path(args.models), args.host, key, limits,
            loading, args.threads, args.log_prompts, args.expand, checked_safety(args))
        return serve_until_stopped(options, listening)
    finally:
        listening.close()


def _check_numbers(args: argparse.Namespace) -> None:
    for name, (least, most) in BOUNDS.items():
        value = getattr(args, name)
        # `not`, since nan is neither below nor above
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name.replace('_', '-')} {value:g} must be {least} to {most:,}")


def _bind(host: str, port: int) -> socket.socket:
    """Return a socket of the address, not listening yet. UserError if it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError):
        raise UserError(f"--host {host}: no address of this name; give 127.0.0.1, 0.0.0.0 or an "
                        "address of this machine") from None
    bound = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # else a restart waits until the last run's connections are gone
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"--host {host} --port {port}: {reason}; give another --port, or end what "
                        "listens there") from None
    return bound


def _parser() -> OneLineParser:
    parser = command_parser(
        "serve", "Serve a model over HTTP: a page at /, OpenAI's images API at /v1, /health, "
        "/ready and /metrics. Logs are JSON lines on stderr.",
        "  tokenloom serve\n"
        "  tokenloom serve demo/model --port 9000\n"
        "  tokenloom serve --models runs --memory 8GiB\n"
        "  openssl rand -hex 32 > key.txt; tokenloom serve --host 0.0.0.0 --api-key-file key.txt")
    parser.add_argument(
        "model", nargs="?", metavar="MODEL",
        help="model folder or hub id (default: the model that comes with Tokenloom)")
    parser.add_argument(
        "--models", metavar="DIR", help="serve every model folder below DIR, loaded when it is "
        "asked for; requests choose by name")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine "
        "alone; any other needs a key)")
    parser.add_argument("--port", type=int, default=8000, help="0 = any free one (default 8000)")
    parser.add_argument(
        "--api-key-file", metavar="FILE", help="file of one line, the key that requests must carry "
        "(default: the variable TOKENLOOM_API_KEY, else none)")

    work = parser.add_argument_group("limits")
    work.add_argument(
        "--rows", type=int, default=16, help="pictures drawn at once by a model, a guided one "
        "takes two rows (default 16)")
    work.add_argument(
        "--queue", type=int, default=32, help="requests that may wait; more get 429 (default 32)")
    work.add_argument(
        "--deadline", type=float, default=120.0, metavar="SECONDS",
        help="for each request; what is later gets 504 (default 120)")
    work.add_argument(
        "--max-n", type=int, default=10, help="pictures a request (default 10)")
    work.add_argument(
        "--memory", metavar="SIZE", help="that loaded models may take together, such as 8GiB; the "
        "one that was used least lately leaves (default: most of what is free at the start)")

    models = parser.add_argument_group("models")
    models.add_argument(
        "--weights", choices=WEIGHTS, help="of the generators (default: float32 on the CPU, "
        "bfloat16 on CUDA); int8 is smaller and faster, and rounds")
    models.add_argument(
        "--text-encoder", metavar="DIR", help="where MODEL's frozen text encoder is, if not where "
        "it was at training")
    models.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    models.add_argument(
        "--device", help="cpu, cuda, cuda:1 (default: the GPU when there is one)")

    add_hook_options(parser)
    parser.add_argument(
        "--log-prompts", action="store_true", help="write prompts into the log (default: their "
        "length alone)")
    return parser
