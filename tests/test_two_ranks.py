"""A number that is not finite on one of two processes: in every mode the step is skipped on both, and weights stay finite."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests import launching


@pytest.mark.long
def test_what_is_not_finite_on_one_rank_changes_no_weight_on_any(tmp_path):
    port = str(launching.free_port())
    ranks = [subprocess.Popen(
        [sys.executable, "tests/two_ranks.py", str(tmp_path)], cwd=launching.REPOSITORY, stderr=subprocess.PIPE, text=True,
        env={**launching.environment(), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_SIZE": "2",
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}) for rank in range(2)]
    messages = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], messages[0][-2000:] + messages[1][-2000:]
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]  # the same weights on both
    assert len(found[0]) >= 3 * 8
    for mode in found[0]:
        # float16 finds its scale by gradients that overflow: those are skipped too, and no incident
        _, precision, kind = mode["mode"]
        expected = {"skipped": 0 if (precision, kind) == ("float16", "gradient") else 1, "unchanged": True, "finite": True,
                    "losses finite": True, "went on": True}
        assert {name: mode[name] for name in expected} == expected, mode
