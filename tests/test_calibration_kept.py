"""Choices kept on disk: found again by processor, versions and shapes; measured anew where the file is no help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from inference.decoder import calibration, choices
from inference.decoder.calibration import fastest_strategy, fastest_threads
from inference.decoder.choices import keep, kept_strategy, kept_threads, strategy_key, threads_key
from inference.decoder.projection import MatmulStrategy
from inference.decoder.timing import Budget
from tests import launching
from tokenloom_common import kept_results, processor
from tokenloom_common.errors import UserError
from tokenloom_common.kept_results import MOST_RESULTS, KeptResults

REAL_CACHE_FOLDER = kept_results.cache_folder  # the fixture of all tests replaces it
STRATEGY = MatmulStrategy("rows", False, 0, 16)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache, a budget that is not spent, and nothing chosen by this process."""
    monkeypatch.setattr(kept_results, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(calibration, "PROCESS_BUDGET", Budget(1.0, lambda: 0.0))
    fastest_strategy.cache_clear()
    yield tmp_path / "cache"
    fastest_strategy.cache_clear()


@pytest.fixture
def measured(monkeypatch):
    """Measuring takes no time and finds STRATEGY; how often it happened, with the thread counts' steps."""
    calls = []

    def measure(*arguments):
        calls.append(arguments[:3])
        return calibration.MeasuredStrategy(STRATEGY, {})

    monkeypatch.setattr(calibration, "measure_strategy", measure)
    return calls


def choose(threads: int = 2, int8: bool = False) -> MatmulStrategy:
    """What another process would choose: its memory is empty."""
    fastest_strategy.cache_clear()
    return fastest_strategy(512, 2048, threads, int8)


def test_a_second_process_measures_nothing(measured):
    assert [choose(), choose(), choose()] == [STRATEGY] * 3
    assert measured == [(512, 2048, False)]


def test_other_shapes_threads_and_precisions_are_measured_for_themselves(measured):
    choose()
    choose(threads=1)
    choose(int8=True)
    fastest_strategy(1024, 4096, 2, False)
    assert len(measured) == 4
    choose()
    assert len(measured) == 4


@pytest.mark.parametrize("changed", ["processor", "versions", "source_hash"])
def test_another_processor_version_or_code_is_measured_anew(measured, monkeypatch, changed):
    choose()
    monkeypatch.setattr(choices, changed, lambda *of: "another")
    choices._machine.cache_clear()
    try:
        choose()
        assert len(measured) == 2
    finally:
        choices._machine.cache_clear()


@pytest.mark.parametrize("content", [
    "", "{", "[]", "null", '{"format": 1}', '{"format": 1, "results": 3}', '{"format": 2, "results": {}}',
    "\0" * 40, "[" * 100_000, '{"a": "' + "x" * (1 << 20) + '"}'])
def test_a_damaged_file_is_measured_anew_and_replaced(measured, folder, content):
    folder.mkdir()
    (folder / "calibration.json").write_text(content)
    assert [choose(), choose()] == [STRATEGY] * 2
    assert len(measured) == 1
    assert json.loads((folder / "calibration.json").read_text())["format"] == 1


@pytest.mark.parametrize("choice", [
    None, 3, "rows", [], ["rows", False, 0], ["diagonal", False, 0, 8], ["rows", 1, 0, 8], ["rows", False, 7, 8],
    ["rows", False, 0, 1 << 40], ["rows", False, 0, [8]], {"storage": "rows"}])
def test_a_choice_that_no_measurement_makes_is_none(choice):
    keep("key", choice, True)
    assert kept_strategy("key") is None


@pytest.mark.parametrize("choice", [None, 0, 5, -1, True, 2.0, "2"])
def test_an_impossible_number_of_threads_is_none(choice):
    keep("key", choice, True)
    assert kept_threads("key", 4) is None


def test_what_was_measured_in_haste_replaces_nothing_thorough():
    keep("key", 2, thorough=False)
    keep("key", 3, thorough=False)
    assert kept_threads("key", 4) == 3
    keep("key", 1, thorough=True)
    keep("key", 4, thorough=False)
    assert kept_threads("key", 4) == 1
    assert choices.is_thorough("key")


def test_a_hasty_result_waits_for_a_thorough_one_that_is_being_written(folder):
    folder.mkdir()
    hasty = threading.Thread(target=keep, args=("key", 2, False))
    with choices.KEPT._locked(choices.KEPT.path):
        hasty.start()
        hasty.join(timeout=0.2)
        assert hasty.is_alive()
        choices.KEPT._write(choices.KEPT.path, {"key": {"choice": 1, "thorough": True}})
    hasty.join()
    assert kept_threads("key", 4) == 1


def test_results_of_processes_that_write_at_once_all_stay(folder, monkeypatch):
    read = KeptResults._read

    def slow(self):
        found = read(self)
        time.sleep(0.05)
        return found

    monkeypatch.setattr(KeptResults, "_read", slow)
    writers = [threading.Thread(target=KeptResults("some.json").put, args=(str(number), number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(read(KeptResults("some.json"))) == ["0", "1", "2", "3"]


def test_without_a_place_to_write_choices_are_measured_each_time(measured, folder, caplog):
    folder.write_text("a file where the folder would be")
    assert [choose(), choose()] == [STRATEGY] * 2
    assert len(measured) == 2
    assert caplog.records == []
    with pytest.raises(UserError, match=r"calibration\.json: cannot be written to"):
        choices.KEPT.check_writable()


def test_without_a_home_nothing_is_kept(measured, monkeypatch):
    monkeypatch.setattr(kept_results, "cache_folder", lambda: None)
    assert [choose(), choose()] == [STRATEGY] * 2
    assert len(measured) == 2
    with pytest.raises(UserError, match="no folder for caches; set XDG_CACHE_HOME"):
        choices.KEPT.check_writable()


def test_what_could_not_be_measured_in_time_is_not_kept(monkeypatch, folder):
    monkeypatch.setattr(calibration, "measure_strategy", lambda *of: None)
    monkeypatch.setattr(calibration, "_has_native", lambda: True)
    assert choose() == MatmulStrategy(native_to=8)
    monkeypatch.setattr(calibration, "_has_native", lambda: False)
    assert choose() == MatmulStrategy()
    assert not folder.exists()


def test_kept_threads_are_set_without_a_step():
    before = torch.get_num_threads()
    try:
        keep("key", 1, thorough=False)
        assert fastest_threads(lambda: pytest.fail("measured"), 4, "key") == 1
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_oldest_results_leave(folder):
    kept = KeptResults("some.json")
    for number in (0, MOST_RESULTS - 1):
        kept.put(str(number), number)
    kept._write(kept.path, {str(number): number for number in range(MOST_RESULTS)})
    kept.put("0", 0)
    kept.put("new", 1)
    assert (kept.get("0"), kept.get("1"), kept.get("2"), kept.get("new")) == (0, None, 2, 1)
    assert (folder / "some.json").stat().st_size < kept_results.MOST_BYTES


@pytest.mark.long
def test_processes_that_write_at_the_same_time_leave_a_whole_file(tmp_path):
    code = ("import sys; from tokenloom_common.kept_results import KeptResults\n"
            "for number in range(20): KeptResults('some.json').put(sys.argv[1] + str(number), number)")
    environment = {**launching.environment(), "XDG_CACHE_HOME": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", code, name], cwd=launching.REPOSITORY, env=environment,
                                stderr=subprocess.PIPE, text=True) for name in "abc"]
    assert [process.communicate()[1] for process in running] == [""] * 3
    assert sorted(os.listdir(tmp_path / "tokenloom")) == [".some.json.lock", "some.json"]
    results = json.loads((tmp_path / "tokenloom" / "some.json").read_text())["results"]
    assert set(results) == {f"{name}{number}" for name in "abc" for number in range(20)}


@pytest.mark.parametrize(("environment", "expected"), [
    ({"XDG_CACHE_HOME": "/a", "HOME": "/b"}, "/a/tokenloom"),
    ({"XDG_CACHE_HOME": "relative", "HOME": "/b"}, "/b/.cache/tokenloom"),
    ({"HOME": "/b"}, "/b/.cache/tokenloom")])
def test_the_folder_is_the_users_cache(monkeypatch, environment, expected):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(REAL_CACHE_FOLDER()) == expected


def test_keys_tell_what_was_measured():
    assert "2048 x 512 int8, 3 threads" in strategy_key(512, 2048, 3, True)
    assert threads_key("shape", 8, 4).endswith("step of shape, 8 rows, up to 4 threads")
    assert processor.processor() in strategy_key(512, 2048, 3, True)
    assert f"torch {torch.__version__}" in strategy_key(512, 2048, 3, True)


# ---- free cores


@pytest.mark.parametrize(("running", "cores", "usable", "free"), [
    ([1] * 11, 8, 8, 8), ([3] * 11, 8, 8, 6), ([1] * 6 + [40] * 5, 8, 8, 8), ([30] * 11, 8, 8, 1), ([61] * 11, 64, 16, 4),
    ([0] * 11, 2, 2, 2)])
def test_cores_that_others_work_on_are_not_free(monkeypatch, tmp_path, running, cores, usable, free):
    load = tmp_path / "loadavg"
    lines = [f"9.00 9.00 9.00 {count}/400 123\n" for count in running]
    load.write_text(lines.pop())
    monkeypatch.setattr(processor, "LOAD", load)
    monkeypatch.setattr(processor.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(processor, "usable_cores", lambda: usable)
    assert processor.free_cores(sleep=lambda seconds: lines and load.write_text(lines.pop())) == free


def test_elsewhere_the_load_of_the_last_minute_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(processor, "LOAD", tmp_path / "none")
    monkeypatch.setattr(processor.os, "getloadavg", lambda: (2.8, 9, 9), raising=False)
    assert processor.others_running() == 3
    monkeypatch.delattr(processor.os, "getloadavg", raising=False)
    assert processor.others_running() == 0
