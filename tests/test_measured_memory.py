"""Predicted memory of training processes against what the kernel measured: within 15 % at every ZeRO stage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import launching

WITHIN = 0.15
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peaks(out: Path, precision: str, count: int = 1) -> list[dict[str, Any]]:
    port = str(launching.free_port())
    ranks = [subprocess.Popen(
        [sys.executable, "tests/peak_of_training.py", str(out), precision], cwd=launching.REPOSITORY, stderr=subprocess.PIPE,
        text=True, env={**launching.environment(), **RETURNED, "RANK": str(rank), "LOCAL_RANK": str(rank),
                        "WORLD_SIZE": str(count), "LOCAL_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        for rank in range(count)]
    messages = [rank.communicate(timeout=550)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * count, messages[0][-2000:]
    found = json.loads((out / "rank0.json").read_text())
    for row in found["rows"]:
        print(f"stage {row['zero_stage']}: predicted {row['predicted'] / 2**20:.1f} MiB, measured "
              f"{row['measured'] / 2**20:.1f} MiB ({row['predicted'] / row['measured'] - 1:+.1%})")
    return found["rows"]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "count"), [("float32", 1), ("float32", 2)])
def test_prediction_is_within_15_percent_of_the_kernels_measurement(tmp_path, precision, count):
    rows = peaks(tmp_path, precision, count)
    assert [row["zero_stage"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert row["measured"] > 100 << 20  # states, not noise
        assert row["predicted"] == pytest.approx(row["measured"], rel=WITHIN), row
