"""Shards read where they lie: the same items as through the cache, every key once an epoch, little kept in memory."""

from __future__ import annotations

import pickle
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.bad_images import encode, photo
from tests.source_files import (
    PNG,
    SAMPLES,
    as_bytes,
    own_cache,  # noqa: F401 (a fixture for all tests here)
    write_tar,
)
from tokenloom_common.errors import DataError, RunFailedError, UserError
from training.data.sources.drops import BadItemError
from training.data.sources.open_dataset import load_source, open_dataset
from training.data.sources.tables import row_groups
from training.data.sources.tars import tar_index
from training.data.visits.images import ImageVisits
from training.data.visits.loader import batch_loader
from training.data.visits.order import DataOrder, MicroBatches

ROWS = 41
PICTURES = [encode(photo(seed=seed), "PNG") for seed in range(4)]


@pytest.fixture
def parquet(tmp_path):
    """Three files of row groups of 5, 20 rows at most."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for number, first in enumerate(range(0, ROWS, 20)):
        rows = range(first, min(ROWS, first + 20))
        table = pa.table({"image": pa.array([as_bytes(PICTURES[row % 4]) for row in rows], kind),
                          "text": [[f"picture {row}", f"number {row}"] for row in rows], "key": [f"k{row}" for row in rows]})
        pq.write_table(table, tmp_path / f"train-{number}.parquet", row_group_size=5)
    return tmp_path


@pytest.fixture
def tars(tmp_path):
    """Five shards of up to nine pictures."""
    for number, first in enumerate(range(0, ROWS, 9)):
        write_tar(tmp_path / f"{number}.tar", [
            member for row in range(first, min(ROWS, first + 9))
            for member in ((f"{row}.png", PICTURES[row % 4]), (f"{row}.txt", f"picture {row}\nnumber {row}".encode()))])
    return tmp_path


class Keys(torch.utils.data.Dataset):
    """What a visit reads, by name."""

    def __init__(self, source):
        self.source = source

    def __getitem__(self, item):
        found = self.source[item.index]
        return item.epoch, found.key, found.image.size


def visited(source, ranks: int, workers: int) -> list[tuple]:
    """The visits of seven steps of six, in the order of the global batches."""
    order = DataOrder(len(source), 5, 12, source.chunk_bounds)
    loaders = [list(batch_loader(Keys(source), MicroBatches(order, 6, 1, rank, ranks, 0, 7), workers, list))
               for rank in range(ranks)]
    return [visit for step in range(7) for rank in range(ranks) for visit in loaders[rank][step]]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["parquet", "tars"])
def test_every_key_once_an_epoch_whatever_the_ranks_and_workers(kind, request):
    source = open_dataset(request.getfixturevalue(kind), streamed_rows=12)
    alone = visited(source, 1, 0)
    keys = [key for epoch, key, _ in alone if epoch == 0]
    assert Counter(keys) == Counter(source.key(row) for row in range(ROWS))
    assert len(set(keys)) == ROWS
    for ranks, workers in ((1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2)):
        assert visited(source, ranks, workers) == alone


@pytest.mark.parametrize("kind", ["parquet", "tars"])
def test_read_in_place_is_what_the_cache_gives(kind, request):
    path = request.getfixturevalue(kind)
    cached, streamed = open_dataset(path), open_dataset(path, streamed_rows=1)
    assert len(streamed) == len(cached) == ROWS
    assert streamed.chunk_bounds[0] == 0 and streamed.chunk_bounds[-1] == ROWS
    assert cached.chunk_bounds is None
    for row in (0, 19, 20, 40, -1):
        ours, theirs = streamed[row], cached[row]
        assert (ours.captions, ours.image.tobytes()) == (theirs.captions, theirs.image.tobytes())
        assert streamed.key(row) == cached.key(row)
        assert streamed.captions(row) == cached.captions(row) and streamed.metadata(row) == cached.metadata(row)
    assert streamed.all_captions() == cached.all_captions()
    again = pickle.loads(pickle.dumps(streamed))
    assert again[7].captions == ["picture 7", "number 7"]


def test_a_row_group_is_decoded_once_a_bucket_and_few_are_kept(parquet, monkeypatch):
    source = open_dataset(parquet, streamed_rows=12)
    decoded = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group",
                        lambda self, group, **options: decoded.append(group) or read(self, group, **options))
    kept = []
    for item in DataOrder(ROWS, 5, 12, source.chunk_bounds).items(0, ROWS):
        assert source[item.index].captions[0] == f"picture {item.index}"
        kept.append(sum(len(table) for table in source.dataset._kept.values()))
    assert len(decoded) == 9  # as many as there are
    assert max(kept) <= 12 + 5
    decoded.clear()
    assert len(source.all_captions()) == 2 * ROWS
    assert len(decoded) == 9


def test_what_cannot_be_read_on_the_way_is_passed_over(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [as_bytes(PNG), as_bytes(PNG), as_bytes(b"no picture"), as_bytes(PNG)]
    pq.write_table(pa.table({"image": pa.array(images, kind), "text": ["a", "  ", "c", "d"]}), tmp_path / "train.parquet")
    source = open_dataset(tmp_path, streamed_rows=1)
    with pytest.raises(BadItemError, match="no caption") as caught:
        source[1]
    assert caught.value.reason == "no caption"
    visit = ImageVisits(source, 8, 0, 0.0)[DataOrder(4, 0).items(0, 4)[1]._replace(index=1)]
    assert [(one.key, one.reason) for one in visit.dropped] == [
        (f"{tmp_path.name} row 1", "no caption"), (f"{tmp_path.name} row 2", "not an image")]


def test_a_file_that_is_damaged_after_opening_costs_its_row_groups(parquet):
    source = open_dataset(parquet, streamed_rows=1)
    (parquet / "train-1.parquet").write_bytes(b"PAR1" * 40)
    with pytest.raises(BadItemError, match=r"train-1\.parquet row group 0: broken parquet file") as caught:
        source[22]
    assert caught.value.reason == "broken parquet file"
    assert source.key(22) == f"{parquet.name} row 22"
    assert source[5].captions == ["picture 5", "number 5"]


def test_a_tars_headers_are_read_once(tars, monkeypatch):
    read = []
    reader = tar_index.read_tars
    monkeypatch.setattr(tar_index, "read_tars", lambda shards, *more: read.extend(shards) or reader(shards, *more))
    first = open_dataset(tars, streamed_rows=1)
    assert len(read) == 5
    assert open_dataset(tars, streamed_rows=1).all_captions() == first.all_captions()
    assert len(read) == 5
    write_tar(tars / "2.tar", [*SAMPLES])
    changed = open_dataset(tars, streamed_rows=1)
    assert [path.name for path in read[5:]] == ["2.tar"]
    assert len(changed) == ROWS - 9 + 2
    assert changed.dropped == open_dataset(tars).dropped == {"no picture": 2, "no caption": 1}
    assert changed.caption_repairs == open_dataset(tars).caption_repairs
    assert changed.metadata(18) == {"caption": "other", "id": 3}


def test_tars_without_one_usable_item(tmp_path):
    write_tar(tmp_path / "0.tar", [("0.png", PNG)])
    with pytest.raises(DataError, match="no usable item"):
        open_dataset(tmp_path, streamed_rows=1)
    assert len(load_source(tmp_path, streamed_rows=1)) == 0


def test_other_data_is_not_streamed(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "a.txt").write_text("a dog")
    with pytest.raises(UserError, match=r"streaming reads parquet and tar shards .* \(sidecar\)"):
        open_dataset(tmp_path, streamed_rows=1)


def test_other_data_has_another_identity(parquet, tmp_path_factory):
    one = open_dataset(parquet, streamed_rows=1)
    assert one.identity() == open_dataset(parquet, streamed_rows=1).identity()
    cached = open_dataset(parquet)
    assert cached.identity() == open_dataset(parquet).identity()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    other = tmp_path_factory.mktemp("other")
    pq.write_table(pa.table({"image": pa.array([as_bytes(PNG)] * ROWS, kind), "text": ["other"] * ROWS}),
                   other / "train.parquet")
    assert open_dataset(other).identity() != cached.identity()


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for row in range(9):
        pq.write_table(pa.table({"image": pa.array([as_bytes(PNG)], kind), "text": [f"picture {row}"]}),
                       tmp_path / f"train-{row}.parquet")
    monkeypatch.setattr(row_groups, "MAX_OPEN", 3)
    source = open_dataset(tmp_path, streamed_rows=1)
    for row in (*range(9), 2, 0):
        assert source[row].captions == [f"picture {row}"]
        assert len(source.dataset._open) <= 3


def test_what_the_machine_lacks_is_no_damaged_picture(parquet, monkeypatch):
    source = open_dataset(parquet, streamed_rows=1)

    def too_many(*_, **__):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(pq, "ParquetFile", too_many)
    with pytest.raises(RunFailedError, match=r"train-0\.parquet: cannot be read \(.*Too many open files"):
        source[3]


def test_captions_of_a_damaged_row_group_are_none(parquet):
    source = open_dataset(parquet, streamed_rows=1)
    (parquet / "train-1.parquet").write_bytes(b"PAR1" * 40)
    assert source.captions(22) == []
    assert len(source.all_captions()) == 2 * (ROWS - 20)


@pytest.mark.parametrize("column", [pa.array([["a list"]]), None])
def test_files_with_other_columns_are_named(parquet, column):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array([as_bytes(PNG)], kind), "other": ["x"]}
    pq.write_table(pa.table(columns if column is None else {**columns, "text": ["plain"]}), parquet / "train-9.parquet")
    words = "is missing" if column is None else "is string"
    with pytest.raises(DataError, match=rf"train-9\.parquet: column 'text' {words}, and list"):
        open_dataset(parquet, streamed_rows=1)


@pytest.mark.parametrize("damage", [
    lambda rows: rows.unlink(), lambda rows: rows.write_bytes(rows.read_bytes()[:100]), lambda rows: rows.write_bytes(b""),
    lambda rows: rows.with_suffix(".json").write_text('{"ro'), lambda rows: rows.with_suffix(".json").write_text("[]"),
    lambda rows: rows.with_suffix(".json").write_text("{}")])
def test_a_damaged_index_of_a_tar_is_made_again(tars, damage):
    import datasets

    expected = open_dataset(tars, streamed_rows=1).all_captions()
    for rows in (datasets.config.HF_DATASETS_CACHE / "tokenloom-tar").glob("*.arrow"):
        damage(rows)
    assert open_dataset(tars, streamed_rows=1).all_captions() == expected
