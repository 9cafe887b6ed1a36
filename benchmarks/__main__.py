"""`python -m benchmarks NAME [options]`: the table of benchmarks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from tokenloom_common.errors import UserError, nearest_name, run_command
from tokenloom_common.outputs import check_output_file, given_value

BENCHMARKS = {
    "tokenizer": ("benchmarks.tokenizer",
                  "image tokenizers: speed and memory beside diffusers, cost of our options"),
    "decode": ("benchmarks.decode.run",
               "drawing image tokens: ours beside x-transformers, transformers and min-dalle"),
    "training": ("benchmarks.training",
                 "a training step: ours beside plain PyTorch and x-transformers"),
    "data": ("benchmarks.data", "reading data: our readers beside datasets and webdataset"),
    "attention": ("benchmarks.attention",
                  "sparse attention patterns: speed and memory beside a dense mask"),
    "serving": ("benchmarks.serving",
                "requests of a server that share a batch, beside single generate calls"),
}
"""Name -> module with `main(argv)`, one line of help."""

USAGE = "usage: python -m benchmarks NAME [--quick] [options]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark: 0 done, 1 failed (not the same work as the peer), 2 the user's mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in BENCHMARKS:
        return run_command(_help, arguments, "benchmarks")

    name, *rest = arguments
    module, _ = BENCHMARKS[name]

    def run(argv: Sequence[str] | None) -> int:
        # before the import, which takes seconds
        out = given_value(rest, "--out", "--json")
        if out is not None:
            check_output_file("--out", out)
        # imported here, so that what one benchmark needs is no need of another
        return importlib.import_module(module).main(argv)

    return run_command(run, rest, f"benchmarks {name}")


def _help(arguments: Sequence[str] | None) -> int:
    if arguments and arguments[0] not in ("-h", "--help"):
        nearest = nearest_name(arguments[0], BENCHMARKS)
        raise UserError(f"unknown benchmark '{arguments[0]}'{nearest}")
    rows = [f"  {name:<12} {text}" for name, (_, text) in BENCHMARKS.items()]
    print("\n".join([USAGE, "", "benchmarks (each has --help):", *rows, "",
                     "The last line of stdout is one JSON document, described in "
                     "benchmarks/README.md."]))
    return 0 if arguments else 2  # help that was asked for, or a missing name


if __name__ == "__main__":
    sys.exit(main())
