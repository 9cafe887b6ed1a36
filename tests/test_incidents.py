"""Skipped steps and loss spikes are noted with the data they were made of."""

from __future__ import annotations

import json
import math

import pytest

from training.data.visits.order import DataOrder
from training.runs.incidents import LEAST, Incidents, read_incidents


def watched(folder, batch_size: int = 3, writes: bool = True) -> Incidents:
    return Incidents(folder, batch_size, DataOrder(50, 5), key=lambda index: f"picture {index}", writes=writes)


def keys_of(step: int, batch_size: int = 3) -> list[str]:
    return [f"picture {item.index}" for item in DataOrder(50, 5).batch(step, batch_size)]


def quiet(step: int) -> float:
    return 4.0 - 0.01 * step + 0.02 * math.sin(step)


def test_a_spike_is_noted_with_its_data_and_what_was_usual(tmp_path, caplog):
    incidents = watched(tmp_path)
    for step in range(60):
        incidents.loss(step, 9.0 if step == 50 else quiet(step))
    (line,) = read_incidents(tmp_path)
    assert (line["step"], line["what"], line["loss"], line["keys"]) == (51, "spike", 9.0, keys_of(50))
    assert line["median"] == pytest.approx(quiet(25), abs=0.05)
    assert len(caplog.messages) == 1
    assert "step 51: loss 9 is far above the 50 steps' before it (median 3.7" in caplog.messages[0]
    assert ", ".join(keys_of(50)) in caplog.messages[0]


@pytest.mark.parametrize("losses", [
    [quiet(step) for step in range(200)],  # falls
    [3.0 + 0.001 * step for step in range(200)],  # rises slowly
    [5.0] * 60 + [5.4],  # within a tenth
    [4.0] * (LEAST - 1) + [9.0],  # too early to tell
    [4.0] * 60 + [math.nan, math.inf]])  # is a skipped step
def test_what_is_no_spike_is_not_noted(tmp_path, losses):
    incidents = watched(tmp_path)
    for step, loss in enumerate(losses):
        incidents.loss(step, loss)
    assert read_incidents(tmp_path) == []
    assert not (tmp_path / "incidents").exists()


def test_a_skipped_step_names_a_few_of_its_data_and_the_file_has_all(tmp_path, caplog):
    watched(tmp_path, batch_size=20).skipped(6)
    (line,) = read_incidents(tmp_path)
    assert (line["step"], line["what"], line["keys"]) == (7, "skipped", keys_of(6, 20))
    assert "step 7 was made of" in caplog.messages[0]
    assert " and 12 more (all in " in caplog.messages[0]
    (tmp_path / "incidents/incidents.jsonl").open("a").write('{"step": 8, "wh')
    assert len(read_incidents(tmp_path)) == 1


def test_only_the_first_process_notes(tmp_path, caplog):
    watched(tmp_path, writes=False).skipped(6)
    assert (read_incidents(tmp_path), caplog.messages) == ([], [])


def test_what_was_noted_of_steps_that_come_again_is_dropped(tmp_path):
    for step in (2, 6):
        later = Incidents(tmp_path, 3, DataOrder(50, 5), str, True, first_step=5) if step != 2 else watched(tmp_path)
        later.skipped(step)
    assert [line["step"] for line in read_incidents(tmp_path)] == [3, 7]
    Incidents(tmp_path, 3, DataOrder(50, 5), str, True, first_step=5)
    assert [line["step"] for line in read_incidents(tmp_path)] == [3]


def test_a_line_is_json(tmp_path):
    watched(tmp_path).skipped(0)
    assert json.loads((tmp_path / "incidents/incidents.jsonl").read_text())["step"] == 1
