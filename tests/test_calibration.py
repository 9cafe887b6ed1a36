"""Calibration on a clock that the tests move by hand."""

from __future__ import annotations

import pytest
import torch

from inference.decoder import calibration
from inference.decoder.calibration import fastest, fastest_strategy, fastest_threads
from inference.decoder.native import threads
from inference.decoder.projection import MatmulStrategy


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def taking(clock: Clock, *seconds: float):
    """A candidate that takes these times in turn, the first one when it warms up."""
    times = iter(seconds)

    def run() -> None:
        clock.now += next(times)

    return run


def test_the_least_median_wins_and_the_warm_up_does_not_count():
    clock = Clock()
    candidates = {"a": taking(clock, 9, 1, 50, 1), "b": taking(clock, 0, 2, 2, 2), "c": taking(clock, 1, 1, 3, 3)}
    best, medians = fastest(candidates, repeats=3, clock=clock)
    assert best == "a"
    assert medians == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize(("slow", "expected"), [
    ((), MatmulStrategy("rows")),
    (("rows",), MatmulStrategy("columns")),
    (("rows", "columns"), MatmulStrategy("rows", True, 16)),
    (("columns",), MatmulStrategy("rows")),
    (("rows", "vector", "flipped"), MatmulStrategy("columns")),
    (("rows", "columns", "flipped"), MatmulStrategy("rows", True))])
def test_what_torch_multiplies_faster_is_chosen_without_compiled_steps(monkeypatch, slow, expected):
    monkeypatch.setattr(threads, "library", lambda: None)
    seen = turns(monkeypatch, lambda names: {name: 2.0 if name in slow else 1.0 for name in names})
    assert fastest_strategy.__wrapped__(512, 600, 1) == expected
    assert seen == [["columns", "rows", "vector"], ["columns", "rows"], ["columns", "rows"], ["columns", "flipped", "rows"]]


def turns(monkeypatch, times) -> list[list[str]]:
    """Candidates run once and take what `times` says of their names; what was measured."""
    seen: list[list[str]] = []

    def measured(candidates, repeats=5):
        for candidate in candidates.values():
            candidate()
        seen.append(sorted(candidates))
        taken = times(candidates)
        return min(taken, key=taken.get), taken

    monkeypatch.setattr(calibration, "fastest", measured)
    monkeypatch.setattr(calibration, "MEASURED_BYTES", 1)
    return seen


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("wins", "expected"), [(1, 8), (3, 32), (4, 64)])
def test_compiled_steps_are_taken_up_to_the_most_rows_that_they_win(monkeypatch, int8, wins, expected):
    others = ["rounded"] if int8 else ["flipped", "rows"]
    seen = turns(monkeypatch, lambda names: {name: 1.0 if name != "native" or len(seen) <= wins else 2.0 for name in names}
                 | {"native": 0.5 if len(seen) <= wins else 2.0})
    way = fastest_strategy.__wrapped__(512, 600, 1, int8)
    assert way.native_to == expected
    assert (way.storage, way.vector) == ("rows", False)
    assert seen == [sorted(["native", *others])] * min(wins + 1, 4)


def test_where_torch_wins_at_once_its_own_ways_are_measured(monkeypatch):
    seen = turns(monkeypatch, lambda names: {name: 2.0 if name in ("native", "columns") else 1.0 for name in names})
    assert fastest_strategy.__wrapped__(512, 600, 1) == MatmulStrategy("rows")
    assert seen[0] == ["flipped", "native", "rows"]
    assert len(seen) == 5
    assert fastest_strategy.__wrapped__(512, 600, 1, True) == MatmulStrategy()
    assert len(seen) == 6


def test_flipped_products_are_used_where_compiled_steps_end(monkeypatch):
    turns(monkeypatch, lambda names: {"native": 1.0, "flipped": 0.5, "rows": 2.0} if compiled.pop() else
          {"native": 0.5, "flipped": 1.0, "rows": 2.0})
    compiled = [True, False, False]
    assert fastest_strategy.__wrapped__(512, 600, 1) == MatmulStrategy("rows", False, 32, 16)


def test_small_matrices_are_not_measured(monkeypatch):
    monkeypatch.setattr(calibration, "fastest", lambda *a: pytest.fail("measured"))
    assert fastest_strategy.__wrapped__(64, 256, 1) == MatmulStrategy()


def test_threads_are_tried_at_powers_of_two_and_the_most_and_left_at_the_best(monkeypatch):
    before = torch.get_num_threads()
    tried = []

    def measured(candidates):
        for candidate in candidates.values():
            candidate()
        tried.extend(candidates)
        return 2, {}

    monkeypatch.setattr(calibration, "fastest", measured)
    try:
        counts = []
        assert fastest_threads(lambda: counts.append(torch.get_num_threads()), 6) == 2
        assert tried == [1, 2, 4, 6]
        assert counts == [1, 1, 2, 2, 4, 4, 6, 6]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
