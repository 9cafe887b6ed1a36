"""The order of the data is a function of seed and step, whatever the number of processes, workers and micro-batches."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy
import pytest
import torch

from tokenloom_common.errors import DataError
from training.data.visits.loader import batch_loader
from training.data.visits.order import (
    DataOrder,
    ItemId,
    MicroBatches,
    item_random,
    uniform,
    visit_bits,
)


def test_every_item_once_an_epoch_and_another_order_in_the_next():
    items = [item for step in range(10) for item in DataOrder(35, 3).batch(step, 7)]
    for epoch in (0, 1):
        assert Counter(i.index for i in items if i.epoch == epoch) == Counter(range(35))
    assert [i.index for i in items[:35]] != [i.index for i in items[35:]]


def micro(world: int, accumulation: int, first: int = 0, last: int = 4) -> list[list[ItemId]]:
    """Global batches put together again from the processes' micro-batches."""
    ranks = [list(MicroBatches(DataOrder(50, 1), 8, accumulation, rank, world, first, last)) for rank in range(world)]
    steps = []
    for step in range(last - first):
        parts = [ranks[rank][step * accumulation + part] for part in range(accumulation) for rank in range(world)]
        steps.append([item for part in parts for item in part])
    return steps


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (1, 4), (2, 2), (4, 2)])
def test_the_global_batch_is_the_same_for_any_split(world, accumulation):
    assert micro(world, accumulation) == micro(1, 1)


def test_resuming_at_a_step_gives_the_same_batches():
    assert micro(2, 2, first=2) == micro(1, 1)[2:]


class Echo(torch.utils.data.Dataset):
    def __len__(self):
        return 50

    def __getitem__(self, item):
        return item


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_do_not_change_the_order(workers):
    loader = batch_loader(Echo(), MicroBatches(DataOrder(50, 1), 8, 1, 0, 1, 0, 3), workers, list)
    assert list(loader) == micro(1, 1, last=3)


def test_a_visits_random_numbers_depend_on_seed_epoch_index_and_purpose_only():
    def draw(seed, epoch, index, purpose):
        return item_random(seed, ItemId(epoch, index), purpose).random()

    numbers = [draw(*key) for key in ((0, 0, 0, "a"), (1, 0, 0, "a"), (0, 1, 0, "a"), (0, 0, 1, "a"), (0, 0, 0, "b"))]
    assert len(set(numbers)) == 5
    assert draw(0, 0, 0, "a") == numbers[0]


def test_many_visits_random_numbers_are_even_and_each_visits_own():
    items = [ItemId(epoch, index) for epoch in range(5) for index in range(4000)]
    draws = uniform(visit_bits(3, items, "caption"))
    assert draws.min() >= 0 and draws.max() < 1
    assert numpy.histogram(draws, 20, (0, 1))[0] == pytest.approx(1000, abs=150)  # 4.9 standard deviations
    one = uniform(visit_bits(3, [ItemId(2, 17)], "caption"))
    assert one == draws[2 * 4000 + 17]
    others = [uniform(visit_bits(seed, items, purpose)) for seed, purpose in ((4, "caption"), (3, "dropout"))]
    neighbours = [draws[1:], draws[4000:]]  # the next item, the next epoch
    for other in (*others, *neighbours):
        assert abs(numpy.corrcoef(draws[: len(other)], other)[0, 1]) < 0.03


RUNS = [0, 30, 37, 100, 130, 200]


@pytest.mark.parametrize("runs", [None, RUNS])
def test_buckets_visit_every_item_once_an_epoch_in_any_piece(runs):
    order = DataOrder(200, 7, 48, runs)
    epochs = [[item.index for item in order.items(epoch * 200, 200)] for epoch in range(3)]
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == list(range(200))
        assert {item.epoch for item in order.items(number * 200, 200)} == {number}
    assert epochs[0] != epochs[1]
    whole = order.items(0, 600)
    for size in (7, 64, 250):
        pieces = [item for start in range(0, 600, size) for item in DataOrder(200, 7, 48, runs).items(start, size)]
        assert pieces[:600] == whole


def test_rows_of_a_run_are_visited_near_one_another_and_shuffled():
    run_of = numpy.searchsorted(RUNS, numpy.arange(200), side="right") - 1
    order = DataOrder(200, 7, 48, RUNS)
    for epoch in range(6):
        rows = numpy.array([item.index for item in order.items(epoch * 200, 200)])
        for run in range(5):
            places = numpy.flatnonzero(run_of[rows] == run)
            assert places.max() - places.min() < 48 + 63 + 30  # a bucket: 48 rows and what its last run has beyond them
            assert rows[places].tolist() != sorted(rows[places])
        assert any(len(set(run_of[rows[start: start + 20]])) > 1 for start in range(0, 180, 20))  # runs are mixed
    assert len({tuple(item.index for item in order.items(epoch * 200, 48)) for epoch in range(6)}) == 6
    spread = numpy.argsort([item.index for item in DataOrder(200, 7).items(0, 200)])[:30]
    assert spread.max() - spread.min() > 150  # a whole permutation has no such neighbourhood


def test_an_order_is_the_same_after_it_was_sent_to_a_worker():
    order = DataOrder(200, 7, 48, RUNS)
    before = order.items(150, 100)
    assert pickle.loads(pickle.dumps(order)).items(150, 100) == before
    assert order.facts() == {"data.shuffle_rows": 48, "data.runs": DataOrder(200, 3, 48, RUNS).facts()["data.runs"]}
    assert order.facts()["data.runs"] != DataOrder(200, 7, 48).facts()["data.runs"]
    assert DataOrder(200, 7, 200).facts() == {}


class Unreadable(Echo):
    def __getitem__(self, item):
        raise DataError(f"item {item.index} is gone; look for it")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_ours_comes_out_of_a_worker_as_it_was(workers):
    with pytest.raises(DataError, match=r"^item \d+ is gone; look for it$"):
        next(iter(batch_loader(Unreadable(), MicroBatches(DataOrder(50, 1), 8, 1, 0, 1, 0, 3), workers, list)))
