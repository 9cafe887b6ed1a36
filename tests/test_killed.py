"""A training that is killed again and again ends where an undisturbed one does."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import launching, tiny
from training.runs.metrics import read_metrics

EVERY = 6  # steps between checkpoints
STEPS_A_KILL = 20
TIMING = {"samples_per_s", "tokens_per_s", "data_wait", "memory_bytes", "elapsed_s"}


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_killed_at_random_moments_a_run_ends_as_if_nothing_had_happened(tmp_path, kills):
    tiny.token_shards(tmp_path, rows=40)
    arguments = ["--config", "debug_seq2seq.yaml", "--data.path", tmp_path / "tokens", "--image_tokenizer",
                 tmp_path / "tokenizer", "--text.vocab_size", 300, "--use_layout", False, "--train.steps", STEPS_A_KILL * kills,
                 "--train.batch_size", 4, "--train.log_every", 1, "--train.sample_every", 0, "--train.weight_ema", 0.9,
                 "--model.dropout", 0.1, "--checkpoint.every_steps", EVERY, "--data.validation_split", "held_out",
                 "--train.validate_every", 2 * EVERY, "--checkpoint.keep_best", True, "--optim.warmup_steps", 5,
                 "--train.threads", 1]
    whole = launching.python("training/train_seq2seq.py", *arguments, "--run_dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr[-2000:]
    log, run = tmp_path / "log.txt", tmp_path / "killed"
    command = [sys.executable, "tests/killing.py", kills, 0, log, *arguments, "--run_dir", run]
    result = subprocess.run(list(map(str, command)), cwd=launching.REPOSITORY, env=launching.environment(), capture_output=True,
                            text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = {name: [{key: number for key, number in row.items() if key not in TIMING}
                   for row in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("whole", "killed")}
    assert rows["killed"] == rows["whole"]
    assert sum("loss" in row for row in rows["whole"]) == STEPS_A_KILL * kills
    assert sum("validation_loss" in row for row in rows["whole"]) == -(-STEPS_A_KILL * kills // (2 * EVERY))
    assert (run / "best.json").read_bytes() == (tmp_path / "whole/best.json").read_bytes()
    models = [{path.relative_to(folder): path.read_bytes() for path in (folder / "model").rglob("*.safetensors")}
              for folder in (tmp_path / "whole", run)]
    assert len(models[0]) == 2
    assert models[0] == models[1]
    check_repeats(log.read_text().splitlines(), kills)


def check_repeats(lines: list[str], kills: int) -> None:
    """Every step was made, none was left out, and none more than EVERY (and the one in flight) were made again."""
    assert sum(line.startswith("killed") for line in lines) == kills
    assert sum(line == "killed while saving" for line in lines) >= kills // 10
    last, reached = -1, -1
    fresh = True
    for line in lines:
        if line.startswith("killed"):
            fresh = True
            continue
        step = int(line.split()[1])
        assert step == last + 1 or (fresh and reached - EVERY <= step <= reached + 1), (last, reached, step)
        last, reached, fresh = step, max(reached, step), False


@pytest.fixture
def kills(request) -> int:
    return request.config.getoption("kills")
