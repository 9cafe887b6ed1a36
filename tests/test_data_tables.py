"""Tables: failed downloads, classes, a column of splits, and folders of save_to_disk."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.bad_images import encode, photo
from tests.source_files import (
    PNG,
    as_bytes,
    own_cache,  # noqa: F401 (a fixture for all tests here)
    write_parquet,
)
from tokenloom_common.errors import DataError, UserError
from training.data.check import check_data, format_report
from training.data.sources.drops import DOWNLOAD_FAILED, DropCounter
from training.data.sources.open_dataset import load_source, open_dataset

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FAILED = "failed_to_download"


def read(path: Path, rows: int, **options) -> dict[str, list[str]]:
    """Captions by key of the items that can be read, through the cache (rows 0) or in place."""
    report = check_data(path, streamed_rows=rows, **options)
    data = load_source(path, streamed_rows=rows, **options)
    bad = {item["key"] for item in report["unusable"]}
    keys = [data.key(row) for row in range(len(data)) if data.key(row) not in bad]
    return {key: data.captions(row) for row in range(len(data)) if (key := data.key(row)) in keys}


# Failed downloads

@pytest.mark.parametrize("column", [
    lambda images: pa.array(images, pa.binary()),  # as img2dataset writes jpg
    lambda images: pa.array([image and as_bytes(image) for image in images], STRUCT),
    lambda images: pa.array([as_bytes(image) for image in images], STRUCT)])
@pytest.mark.parametrize("facts", [
    {"status": ["success", FAILED, "failed_to_resize", "success", "success", None]},
    {"status": [200, 404, 503, 200, 200, None]},
    {"error_message": [None, "HTTP Error 404", "timed out", "", None, None]}])
@pytest.mark.parametrize("rows", [0, 1])
def test_rows_whose_download_failed_are_no_damage(tmp_path, column, facts, rows):
    images = column([PNG, None, None, PNG, None, None])
    pq.write_table(pa.table({"jpg": images, "caption": ["a", "b", None, "d", "e", "f"], **facts}), tmp_path / "0.parquet")
    report = check_data(tmp_path, streamed_rows=rows)
    assert (report["usable"], report["items"], report["unusable_by_reason"]) == (2, 4, {"no picture": 2})
    assert report["left_out"] == {"downloads failed": 2}
    assert "downloads failed   2" in format_report(report).splitlines()


def test_a_status_beside_a_picture_means_something_else(tmp_path):
    write_parquet(tmp_path / "0.parquet", [as_bytes(PNG)] * 3, ["a", "b", "c"], status=["pending", "approved", "success"])
    for rows in (0, 1):
        report = check_data(tmp_path, streamed_rows=rows)
        assert report["usable"] == 3 and not report["left_out"]


def test_nothing_but_failed_downloads_is_said(tmp_path):
    write_parquet(tmp_path / "0.parquet", [None, None], ["a", "b"], status=[FAILED, FAILED])
    with pytest.raises(DataError, match=r"no usable item \(2 downloads failed\)"):
        open_dataset(tmp_path)


def test_failed_downloads_do_not_count_towards_the_limit(tmp_path):
    drops = DropCounter("d", 0.01)
    for _ in range(1000):
        drops.record(DOWNLOAD_FAILED, "x")
    for _ in range(10):
        drops.record("truncated", "y")
    assert drops.failed_downloads == 1000 and drops.summary() == "dropped 10 of 1,010 (10 truncated)"
    with pytest.raises(DataError, match=r"more than --data\.max_bad_fraction 0\.01 allows"):
        drops.record("truncated", "z")


# Classes

def classes(names: list[str] | None, values: list, column: str = "label", kind: pa.DataType | None = None) -> pa.Table:
    """A table of PNGs with a column of classes, as `datasets` writes it where the names are given."""
    table = pa.table({"image": pa.array([as_bytes(PNG)] * len(values)), column: pa.array(values, kind)})
    if names is None:
        return table
    features = {column: {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    if kind is not None and pa.types.is_list(kind):
        features[column] = {"feature": features[column], "_type": "List"}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("names, kind, values, captions", [
    (["tench", "猫"], pa.int64(), [1, 0, 1], [["猫"], ["tench"], ["猫"]]),
    (None, pa.int64(), [3, 0, -1], [["3"], ["0"], ["-1"]]),
    (None, pa.uint8(), [7, 255, 0], [["7"], ["255"], ["0"]]),
    (None, pa.string(), ["cat", "dog", "cat"], [["cat"], ["dog"], ["cat"]]),
    (None, pa.float64(), [2.0, 0.0, 2.0], [["2"], ["0"], ["2"]]),
    (["a", "b", "c"], pa.list_(pa.int64()), [[0, 2], [1], [2]], [["a", "c"], ["b"], ["c"]])])
def test_classes_are_captions(tmp_path, rows, names, kind, values, captions):
    pq.write_table(classes(names, values, kind=kind), tmp_path / "train.parquet")
    data = open_dataset(tmp_path, streamed_rows=rows)
    assert [data.captions(row) for row in range(3)] == [data[row].captions for row in range(3)] == captions
    assert data.all_captions() == [caption for of_row in captions for caption in of_row]
    again = pickle.loads(pickle.dumps(data))
    assert again.captions(0) == captions[0] and again.identity() == data.identity()


@pytest.mark.parametrize("column", ["labels", "class", "cls", "category", "fine_label"])
def test_a_single_column_of_classes_is_found(tmp_path, column):
    pq.write_table(classes(["x", "y"], [0, 1], column), tmp_path / "train.parquet")
    for rows in (0, 1):
        assert open_dataset(tmp_path, streamed_rows=rows).all_captions() == ["x", "y"]


def test_columns_are_found_in_any_case_and_as_pandas_writes_categories(tmp_path):
    labels = pa.array(["cat", "dog", None, "cat"]).dictionary_encode()
    pq.write_table(pa.table({"JPG": [PNG] * 4, "Label": labels, "url": ["x"] * 4}), tmp_path / "0.parquet")
    for rows in (0, 1):
        report = check_data(tmp_path, streamed_rows=rows)
        assert report["unusable_by_reason"] == {"no caption": 1}
        assert open_dataset(tmp_path, streamed_rows=rows).captions(1) == ["dog"]
    pq.write_table(pa.table({"image": [PNG], "TEXT": ["a"], "status": ["ok"]}), tmp_path / "0.parquet")
    assert open_dataset(tmp_path).all_captions() == ["a"] == open_dataset(tmp_path, streamed_rows=1).all_captions()
    assert open_dataset(tmp_path, caption_column="status").all_captions() == ["ok"]


def test_several_columns_of_classes_have_to_be_chosen_from(tmp_path):
    table = classes(None, [4, 5]).append_column("fine_label", pa.array([50, 60]))
    pq.write_table(table, tmp_path / "train.parquet")
    for rows in (0, 1):
        with pytest.raises(UserError, match=r"several of classes \(label, fine_label\); .* --data\.caption_column"):
            open_dataset(tmp_path, streamed_rows=rows)
        assert open_dataset(tmp_path, streamed_rows=rows, caption_column="fine_label").all_captions() == ["50", "60"]
    pq.write_table(table.append_column("text", pa.array(["a", "b"])), tmp_path / "train.parquet")
    assert open_dataset(tmp_path).all_captions() == ["a", "b"]


@pytest.mark.parametrize("rows", [0, 1])
def test_rows_without_a_class_have_no_caption(tmp_path, rows):
    pq.write_table(classes(["x", "y"], [0, -1, None, 2, 1]), tmp_path / "train.parquet")
    report = check_data(tmp_path, streamed_rows=rows)
    assert report["usable"] == 2 and report["unusable_by_reason"] == {"no caption": 3}


def test_files_with_other_names_of_classes_are_refused(tmp_path):
    for number, names in enumerate((["cat", "dog"], ["dog", "cat"])):
        pq.write_table(classes(names, [0, 1]), tmp_path / f"train-{number}.parquet")
    for rows in (0, 1):
        with pytest.raises(DataError, match=r"train-1\.parquet: the classes .*'label' have other names than in train-0"):
            open_dataset(tmp_path, streamed_rows=rows)


def test_other_names_of_classes_are_other_data(tmp_path):
    identities = []
    for names in (["cat", "dog"], ["dog", "cat"]):
        pq.write_table(classes(names, [0, 1]), tmp_path / "train.parquet")
        identities.append(open_dataset(tmp_path).identity())
    assert identities[0] != identities[1]


# A column of splits

@pytest.mark.parametrize("values, kept", [
    (["train", "val", "test", "train", "restval", None], ["0", "3"]),
    (["Training", "TEST", "train", "dev", "valid", "x"], ["0", "2"]),
    (["train"] * 6, list("012345")), (["a", "b", "a", None, "c", "c"], list("012345")), ([1, 2, 1, 2, 1, 2], list("012345"))])
@pytest.mark.parametrize("rows", [0, 1, 100])
def test_rows_of_other_splits_are_left_out_and_said(tmp_path, rows, values, kept):
    captions = [str(row) for row in range(6)]
    path = write_parquet(tmp_path / "data.parquet", [as_bytes(PNG)] * 6, captions, split=values)
    pq.write_table(pq.read_table(path), path, row_group_size=2)
    data = open_dataset(tmp_path, streamed_rows=rows)
    assert data.all_captions() == kept == [data[row].captions[0] for row in range(len(data))]
    assert data.left_out == ({"rows of other splits (column split)": 6 - len(kept)} if len(kept) < 6 else {})
    lines = format_report(check_data(tmp_path, streamed_rows=rows)).splitlines()
    assert (f"rows of other splits (column split) {6 - len(kept)}" in lines) == (len(kept) < 6)
    if rows:
        assert data.chunk_bounds[-1] == len(data) and len(set(data.chunk_bounds)) == len(data.chunk_bounds)


def test_the_splits_of_files_come_first(tmp_path):
    for name in ("train", "validation"):
        write_parquet(tmp_path / f"{name}.parquet", [as_bytes(PNG)] * 2, [name] * 2, split=[name] * 2)
    for rows in (0, 1):
        data = open_dataset(tmp_path, split="validation", streamed_rows=rows)
        assert data.all_captions() == ["validation"] * 2 and not data.left_out


def test_nothing_of_the_split_is_said(tmp_path):
    write_parquet(tmp_path / "data.parquet", [as_bytes(PNG)] * 2, ["a", "b"], split=["val", "test"])
    for rows in (0, 1):
        with pytest.raises(DataError, match=r"no usable item \(2 rows of other splits \(column split\)\)"):
            open_dataset(tmp_path, streamed_rows=rows)


# save_to_disk

@pytest.fixture
def saved(tmp_path):
    """A folder with splits train and test of save_to_disk."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

    features = Features({"image": Image(), "text": Value("string"), "label": ClassLabel(names=["x", "y"])})
    splits = {name: Dataset.from_dict({"image": [as_bytes(encode(photo(seed=row), "PNG")) for row in range(4)],
                                       "text": [f"{name} {row}" for row in range(4)], "label": [0, 1, 1, 0]}, features=features)
              for name in ("train", "test")}
    DatasetDict(splits).save_to_disk(str(tmp_path / "a [1] 猫"), num_shards={"train": 2, "test": 1})
    return tmp_path / "a [1] 猫"


def test_folders_of_save_to_disk_are_read(saved):
    data = open_dataset(saved)
    assert data.all_captions() == [f"train {row}" for row in range(4)]
    assert data[3].image.tobytes() == photo(seed=3).convert("RGB").tobytes() and data.metadata(1) == {"label": 1}
    assert open_dataset(saved, split="test").all_captions() == [f"test {row}" for row in range(4)]
    assert open_dataset(saved / "test").all_captions() == [f"test {row}" for row in range(4)]
    assert open_dataset(saved, caption_column="label").all_captions() == ["x", "y", "y", "x"]
    with pytest.raises(UserError, match=r"another kind of data \(saved\), so leave data\.streaming out"):
        open_dataset(saved, streamed_rows=1)


def edit_state(folder: Path, **changes) -> None:
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, **changes}))


@pytest.mark.parametrize("damage", [
    lambda folder: next(folder.glob("*.arrow")).unlink(), lambda folder: next(folder.glob("*.arrow")).write_bytes(b"x" * 99),
    lambda folder: (folder / "state.json").write_text("{"), lambda folder: (folder / "state.json").write_text("[]"),
    lambda folder: (folder / "state.json").write_bytes(b"\xff\xfe"), lambda folder: edit_state(folder, _data_files=[]),
    lambda folder: edit_state(folder, _data_files=[{"filename": "../test/data-00000-of-00001.arrow"}]),
    lambda folder: edit_state(folder, _data_files=[{"filename": "/etc/hostname"}]),
    lambda folder: edit_state(folder, _data_files=7), lambda folder: edit_state(folder, _data_files=[{"filename": 7}]),
    lambda folder: edit_state(folder, _data_files=["x"]), lambda folder: next(folder.glob("*.arrow")).write_bytes(b""),
    lambda folder: (lambda path: path.write_bytes(path.read_bytes()[:-8]))(next(folder.glob("*.arrow")))])
def test_a_damaged_folder_is_one_line(saved, damage):
    damage(saved / "train")
    with pytest.raises(DataError, match=r"train: a damaged folder of save_to_disk .*save or copy it again") as caught:
        open_dataset(saved)
    assert "\n" not in str(caught.value)


def test_only_the_rows_and_columns_of_saved_data_are_trusted(saved, tmp_path):
    """Not a format that hides columns, not a dataset_info of other data."""
    edit_state(saved / "train", _format_columns=["label"], _format_type="torch")
    (saved / "train" / "dataset_info.json").write_text("not even JSON")
    assert open_dataset(saved)[2].captions == ["train 2"]


def test_saved_pictures_by_path_must_lie_in_the_folder(tmp_path):
    from datasets import Dataset

    images = ["/etc/hostname", "in.png", None]  # as text: save_to_disk takes the content of others into the table
    Dataset.from_dict({"image": images, "text": ["a", "b", "c"]}).save_to_disk(str(tmp_path / "s"))
    (tmp_path / "s" / "in.png").write_bytes(PNG)
    assert read(tmp_path / "s", 0) == {"s row 1": ["b"]}
    assert check_data(tmp_path / "s")["unusable_by_reason"] == {"no picture": 1, "path outside the folder": 1}
