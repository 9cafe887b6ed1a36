"""Predicted memory of training processes against what the kernel measured, and scripts that refuse what cannot fit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import launching, tiny

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


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    tiny.token_shards(folder, 12)
    return folder


def arguments(made: Path, run_dir: Path) -> list[str]:
    return ["--config", "debug_seq2seq", "--data.path", str(made / "tokens"), "--image_tokenizer", str(made / "tokenizer"),
            "--run_dir", str(run_dir), "--use_layout", "false", "--train.steps", "1", "--train.batch_size", "4"]


@pytest.mark.slow
def test_the_script_refuses_before_it_touches_anything(made, tmp_path):
    """parti-20b needs 300 GB on one process."""
    done = launching.python("training/train_seq2seq.py", *arguments(made, tmp_path / "run"), "--model.preset", "parti-20b",
                            "--deepspeed.zero_stage", "0")
    assert done.returncode == 2, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(lines) == 1 and "Traceback" not in done.stderr
    assert re.search(r"needs more than \d+\.\d+ GiB of memory, and [\d.]+ [GM]iB are there; no ZeRO stage", lines[0]), lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_limit_of_the_process_is_seen(made, tmp_path):
    """ulimit -v: the memory that there is need not be the machine's."""
    code = ("import resource, runpy, sys; from inference.memory.available import kernel_numbers; "
            "from pathlib import Path; import torch; "
            "import deepspeed; used = kernel_numbers(Path('/proc/self/status'))['VmSize:']; "
            "resource.setrlimit(resource.RLIMIT_AS, (used + (900 << 20),) * 2); sys.argv = sys.argv[1:]; "
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    command = [sys.executable, "-c", code, "training/train_seq2seq.py", *arguments(made, tmp_path / "run"), "--model.preset",
               "parti-750m"]
    done = subprocess.run(command, cwd=launching.REPOSITORY, env=launching.environment(), text=True, timeout=240,
                          capture_output=True, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "of memory, and" in done.stderr
