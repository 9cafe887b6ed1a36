"""`python -m benchmarks NAME [options]`: the table of benchmarks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from tokenloom_common.errors import UserError, nearest_name, run_command

BENCHMARKS = {
    "tokenizer": ("benchmarks.tokenizer", "main", "image tokenizers: speed and memory beside diffusers, cost of our options"),
    "decode": ("benchmarks.decode.run", "main", "drawing image tokens: ours beside x-transformers, transformers and min-dalle"),
    "training": ("benchmarks.training", "main", "a training step: ours beside plain PyTorch and x-transformers"),
    "data": ("benchmarks.data", "main", "reading data: our readers beside datasets and webdataset"),
    "attention": ("benchmarks.attention", "main", "sparse attention patterns: speed and memory beside a dense mask"),
}
"""Name -> module, function taking argv, one line of help."""

USAGE = "usage: python -m benchmarks NAME [--quick] [options]"


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 1 failed (ours and the peer did not do the same work), 2 the user's mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in BENCHMARKS:
        module, function, _ = BENCHMARKS[arguments[0]]
        return run_command(lambda rest: getattr(importlib.import_module(module), function)(rest), arguments[1:],
                           f"benchmarks {arguments[0]}")
    return run_command(_help, arguments, "benchmarks")


def _help(arguments: Sequence[str] | None) -> int:
    if arguments and arguments[0] not in ("-h", "--help"):
        raise UserError(f"unknown benchmark '{arguments[0]}'{nearest_name(arguments[0], BENCHMARKS)}")
    rows = [f"  {name:<12} {text}" for name, (_, _, text) in BENCHMARKS.items()]
    print("\n".join([USAGE, "", "benchmarks (each has --help):", *rows, "",
                     "The last line of stdout is one JSON document; benchmarks/README.md says what is in it."]))
    return 0 if arguments else 2


if __name__ == "__main__":
    sys.exit(main())
