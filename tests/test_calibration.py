"""Calibration on a clock that the tests move by hand."""

from __future__ import annotations

import pytest
import torch

from inference.decoder import calibration
from inference.decoder.calibration import fastest_strategy, fastest_threads, measure_strategy
from inference.decoder.native import threads
from inference.decoder.projection import MatmulStrategy
from inference.decoder.timing import Budget, fastest

UNLIMITED = Budget(None)


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
    best, medians = fastest(candidates, Budget(None, clock), repeats=3)
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
    assert measure_strategy(512, 600, False, UNLIMITED).strategy == expected
    assert seen == [["columns", "rows", "vector"], ["columns", "rows"], ["columns", "rows"], ["columns", "flipped", "rows"]]


def turns(monkeypatch, times) -> list[list[str]]:
    """Candidates run once and take what `times` says of their names; what was measured."""
    seen: list[list[str]] = []

    def measured(candidates, budget, repeats=5):
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
    way = measure_strategy(512, 600, int8, UNLIMITED).strategy
    assert way.native_to == expected
    assert (way.storage, way.vector) == ("rows", False)
    assert seen == [sorted(["native", *others])] * min(wins + 1, 4)


def test_where_torch_wins_at_once_its_own_ways_are_measured(monkeypatch):
    seen = turns(monkeypatch, lambda names: {name: 2.0 if name in ("native", "columns") else 1.0 for name in names})
    assert measure_strategy(512, 600, False, UNLIMITED).strategy == MatmulStrategy("rows")
    assert seen[0] == ["flipped", "native", "rows"]
    assert len(seen) == 5
    assert measure_strategy(512, 600, True, UNLIMITED).strategy == MatmulStrategy()
    assert len(seen) == 6


def test_flipped_products_are_used_where_compiled_steps_end(monkeypatch):
    turns(monkeypatch, lambda names: {"native": 1.0, "flipped": 0.5, "rows": 2.0} if compiled.pop() else
          {"native": 0.5, "flipped": 1.0, "rows": 2.0})
    compiled = [True, False, False]
    assert measure_strategy(512, 600, False, UNLIMITED).strategy == MatmulStrategy("rows", False, 32, 16)


def test_small_matrices_are_not_measured(monkeypatch):
    monkeypatch.setattr(calibration, "fastest", lambda *a: pytest.fail("measured"))
    assert fastest_strategy(64, 256, 1, False) == MatmulStrategy()


def test_threads_are_tried_at_powers_of_two_and_the_most_and_left_at_the_best(monkeypatch):
    before = torch.get_num_threads()
    tried = []

    def measured(candidates, budget):
        for candidate in candidates.values():
            candidate()
        tried.extend(candidates)
        return 2, {count: abs(count - 2) for count in candidates}

    monkeypatch.setattr(calibration, "fastest", measured)
    try:
        counts = []
        assert fastest_threads(lambda: lambda: counts.append(torch.get_num_threads()), 6, "key") == 2
        assert tried == [1, 2, 4, 6]
        assert counts == [1, 1, 2, 2, 4, 4, 6, 6]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---- the budget


def test_a_spent_budget_ends_the_runs_and_what_is_timed_counts():
    clock = Clock()
    budget = Budget(10, clock)
    candidates = {"a": taking(clock, 1, 3, 1), "b": taking(clock, 1, 2, 5, 5)}
    # warm-ups 2, a 3, b 2, a 1: 8 of 10 seconds; b 5: 13, and no further run begins
    assert fastest(candidates, budget, repeats=5) == ("a", {"a": 2, "b": 3.5})
    assert budget.spent == 13


@pytest.mark.parametrize("seconds", [0, 1, 2, 3])
def test_without_a_time_of_each_nothing_is_chosen(seconds):
    clock = Clock()
    assert fastest({"a": taking(clock, 1, 1), "b": taking(clock, 1)}, Budget(seconds, clock), repeats=5) is None
    assert clock.now == seconds


def test_several_measurements_share_one_budget():
    clock = Clock()
    budget = Budget(10, clock)
    assert fastest({"a": taking(clock, 1, 1)}, budget, repeats=1) == ("a", {"a": 1})
    clock.now += 100  # work between measurements is free
    assert budget.spent == 2
    with budget.spending():
        clock.now += 5
        assert budget.spent == 7
        assert fastest({"a": taking(clock, 1, 1)}, budget, repeats=1) == ("a", {"a": 1})
        assert budget.spent == 9
    assert not budget.is_spent
    assert fastest({"a": taking(clock, 1)}, budget, repeats=1) is None
    assert budget.is_spent


def test_rows_beyond_the_budget_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(calibration, "MEASURED_BYTES", 1)
    timed = iter([("native", {"native": 1.0}), ("native", {"native": 1.0}), None])
    monkeypatch.setattr(calibration, "fastest", lambda *of: next(timed))
    assert measure_strategy(512, 600, False, UNLIMITED).strategy == MatmulStrategy(native_to=16)
    monkeypatch.setattr(calibration, "fastest", lambda *of: None)
    assert measure_strategy(512, 600, False, UNLIMITED) is None


def test_a_spent_budget_measures_nothing_at_all(monkeypatch):
    monkeypatch.setattr(calibration, "fastest", lambda *of: pytest.fail("measured"))
    clock = Clock()
    assert measure_strategy(512, 600, False, Budget(0, clock)) is None
    assert calibration.measure_threads(lambda: pytest.fail("built"), 4, Budget(0, clock)) is None


def test_strategies_and_threads_share_the_second_of_a_process(monkeypatch):
    monkeypatch.setattr(calibration, "PROCESS_BUDGET", Budget(0, Clock()))
    before = torch.get_num_threads()
    try:
        assert fastest_threads(lambda: pytest.fail("built"), before + 1, "nothing kept by this key") == before + 1
        fastest_strategy.cache_clear()
        assert fastest_strategy(512, 4000, 1, False).native_to in (0, 8)  # unmeasured
    finally:
        torch.set_num_threads(before)
        fastest_strategy.cache_clear()
