"""Convert a checkpoint in a process of its own and print the most memory that it took, beyond what it had before, in bytes.

python -m tests.peak_of_conversion KIND SRC OUT [RESOLUTION [CONFIG]]
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from inference.checkpoints import ConvertOptions, convert
from inference.checkpoints.writing import write_converted
from inference.memory.meta_device import build_on_meta
from tokenizer_image import VQGAN, preset


def peak() -> int:
    """Most bytes that this process ever had in memory, mapped files among them (getrusage also counts what its parent had)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) << 10


if __name__ == "__main__":
    kind, source, out = sys.argv[1:4]
    resolution = int(sys.argv[4]) if len(sys.argv) > 4 else None
    config = Path(sys.argv[5]) if len(sys.argv) > 5 else None
    importlib.import_module(f"inference.checkpoints.formats.{kind.replace('-', '_')}")
    build_on_meta(VQGAN, preset("debug")).state_dict()  # brings in what torch needs for shapes, which no file's size changes
    before = peak()
    write_converted(convert(kind, Path(source), ConvertOptions(config=config, resolution=resolution)), source, out)
    print(peak() - before)
