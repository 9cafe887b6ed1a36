"""Convert a checkpoint in a process of its own; print its peak memory beyond the start, in bytes.

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
    """Peak resident bytes of this process, mapped files included (getrusage adds the parent's)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) << 10


if __name__ == "__main__":
    kind, source, out = sys.argv[1:4]
    resolution = int(sys.argv[4]) if len(sys.argv) > 4 else None
    config = Path(sys.argv[5]) if len(sys.argv) > 5 else None
    importlib.import_module(f"inference.checkpoints.formats.{kind.replace('-', '_')}")
    # imports torch's code for shapes, whose memory does not depend on the file
    build_on_meta(VQGAN, preset("debug")).state_dict()
    before = peak()
    options = ConvertOptions(config=config, resolution=resolution)
    write_converted(convert(kind, Path(source), options), source, out)
    print(peak() - before)
