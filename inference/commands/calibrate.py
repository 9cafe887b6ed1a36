"""`tokenloom calibrate`: measure this machine at leisure, and keep what is fastest for a model."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from inference.commands.options import add_revision, command_parser, thread_trial
from inference.shipped import default_model_folder
from tokenloom_common.errors import OneLineParser
from tokenloom_common.imports import importing_torch
from tokenloom_common.kept_results import CALIBRATION_NAME, KeptResults
from tokenloom_common.processor import free_cores, processor, usable_cores

if TYPE_CHECKING:
    from inference.decoder.calibration import MeasuredStrategy
    from inference.decoder.projection import Precision
    from inference.pipeline import TextToImage

# of a step: the number of pictures, twice that with guidance; up to the default batch with it
ROWS = (1, 2, 4, 8, 16, 32, 64)


def calibrate(argv: Sequence[str] | None = None) -> int:
    """Measure products and thread counts for a model, print them, and keep what is fastest."""
    args = _parser().parse_args(argv)
    folder = default_model_folder() if args.model is None else args.model
    place = KeptResults(CALIBRATION_NAME).check_writable()

    free = free_cores()
    if free < usable_cores():
        print(f"tokenloom calibrate: other processes are at work, so only {free} of "
              f"{usable_cores()} cores are measured; run it again when the machine is quiet",
              file=sys.stderr)
    print(f"processor: {processor()}")
    _measure(folder, args.weights, args.revision, free)
    print(f"kept in {place}")
    return 0


def _parser() -> OneLineParser:
    parser = command_parser(
        "calibrate",
        "Measure which matrix products and how many CPU threads are fastest for a model, print\n"
        "them, and keep them for later commands. Without this, commands measure for a second when\n"
        "they first meet a model's sizes. Run it while the machine is otherwise quiet.",
        "  tokenloom calibrate\n"
        "  tokenloom calibrate demo/model\n"
        "  tokenloom calibrate demo/model --weights int8")
    parser.add_argument(
        "model", nargs="?", metavar="MODEL",
        help="model folder or hub id (default: the model that ships with Tokenloom)")
    add_revision(parser)
    parser.add_argument(
        "--weights", choices=("float32", "int8"), default="float32",
        help="of the generator (default float32)")
    return parser


def _measure(folder: str | Path, weights: Precision, revision: str | None, cores: int) -> None:
    """Measure the products with each thread count, then the threads of a step; print and keep."""
    with importing_torch():
        import torch

        from inference.decoder.calibration import fastest_strategy, thread_counts
        from inference.model_folder import load_model_folder
        from inference.pipeline import TextToImage

    parts = load_model_folder(folder, "cpu", revision)
    most = min(torch.get_num_threads(), cores)
    for threads in thread_counts(most):
        torch.set_num_threads(threads)
        _measure_products(parts.seq2seq.config.width, weights, threads)

    # what this process has read before is not to be used
    fastest_strategy.cache_clear()
    torch.set_num_threads(most)
    model = TextToImage(parts, weights=weights)
    if most == 1:
        print("one core: nothing to choose among numbers of threads")
        return
    for rows in ROWS:
        _measure_threads(model, rows, most)
    torch.set_num_threads(most)


def _measure_products(width: int, weights: Precision, threads: int) -> None:
    """Measure products of matrices of this width; torch has `threads` threads."""
    from inference.decoder.calibration import SMALL_MATRIX, measure_strategy
    from inference.decoder.choices import keep, strategy_key
    from inference.decoder.timing import Budget

    shape = f"{4 * width} x {width}"
    if 4 * width * width < SMALL_MATRIX:
        print(f"products of {shape}, {_threads(threads)}: too small for a choice")
        return
    int8 = weights == "int8"
    measured = measure_strategy(width, 4 * width, int8, Budget(None))
    assert measured is not None, "without a limit of time there is always a result"
    keep(strategy_key(width, 4 * width, threads, int8), measured.strategy, thorough=True)
    _print_products(f"{shape} {weights}, {_threads(threads)}", measured)


def _measure_threads(model: TextToImage, rows: int, most: int) -> None:
    """Measure a step of `rows` rows with up to `most` threads."""
    from inference.decoder.calibration import measure_threads
    from inference.decoder.choices import keep
    from inference.decoder.timing import Budget

    make_step, key = thread_trial(model, rows, most)
    seconds = measure_threads(make_step, most, Budget(None))
    assert seconds is not None, "without a limit of time there is always a result"
    best = min(seconds, key=lambda count: seconds[count])
    keep(key, best, thorough=True)
    times = {_threads(count): value / 2 for count, value in seconds.items()}  # of two steps
    print(f"step of {rows:>2} rows: {_times(times)} -> {_threads(best)}")


def _print_products(matrices: str, measured: MeasuredStrategy) -> None:
    for rows, seconds in measured.seconds.items():
        best = min(seconds, key=lambda name: seconds[name])
        print(f"products of {matrices}, {rows:>2} rows: {_times(seconds)} -> {best}")
    strategy = measured.strategy
    if strategy.native_to:
        print(f"  chosen: compiled steps up to {strategy.native_to} rows")
    else:
        print(f"  chosen: torch's products, matrices stored as {strategy.storage}")


def _times(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {1000 * value:.2f} ms" for name, value in seconds.items())


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"
