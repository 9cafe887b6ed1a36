"""Conversion holds its source mapped and one tensor beside it: at most 1.2 times the largest file, of which the file is 1."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests import launching
from tests.llamagen_reference import Sizes, shapes


@pytest.mark.slow
def test_peak_memory_of_a_conversion(tmp_path):
    """300 MB of bfloat16: queries, keys and values are taken apart, and two matrices of each feed-forward put together."""
    sizes = Sizes(width=1024, heads=16, kv_heads=16, layers=12, inner=2816, codes=1024, classes=1001)
    state = {name: (torch.randn(shape) * 0.02).to(torch.bfloat16) for name, shape in shapes(sizes).items()}
    source = tmp_path / "c2i.pt"
    torch.save({"model": state}, source)
    (tmp_path / "heads.json").write_text('{"n_head": 16}')
    command = [sys.executable, "-m", "tests.peak_of_conversion", "llamagen-gpt", str(source), str(tmp_path / "out"), "256",
               str(tmp_path / "heads.json")]
    done = subprocess.run(command, cwd=launching.REPOSITORY, env=launching.environment(), capture_output=True, text=True,
                          timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ratio = int(done.stdout) / source.stat().st_size
    print(f"peak memory: {ratio:.2f} of the file")
    assert ratio < 1.2
