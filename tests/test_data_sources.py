"""Captions, data sets of any format, unusable items: usable ones, and what is refused in one line."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest

from tests.source_files import (
    PNG,
    as_bytes,
    own_cache,  # noqa: F401 (a fixture for all tests here)
    write_metadata,
    write_parquet,
    write_tar,
)
from tokenloom_common.errors import DataError, MissingFileError, UserError
from training.data.sources.captions import MAX_CAPTION_CHARS, clean_caption, clean_captions
from training.data.sources.drops import BadItemError, DropCounter
from training.data.sources.open_dataset import list_splits, load_source, open_dataset

# Captions

@pytest.mark.parametrize("value, text, repairs", [
    ("a  red\theart\n", "a red heart", ()), ("", "", ("empty",)), (" \n ", "", ("empty",)),
    ("a\0b", "ab", ("NUL characters",)), (b"caf\xe9", "", ("not UTF-8",)), ("caf\udce9", "caf?", ("not UTF-8",)),
    ("🐙🎨👩‍🌾🏳️‍🌈", "🐙🎨👩‍🌾🏳️‍🌈", ()), ("�", "�", ()), ("�".encode(), "�", ()), ("\ufeffa dog", "a dog", ()),
    (7, "", ("not text",)), (None, "", ("not text",))])
def test_caption_is_cleaned_and_the_repair_is_named(value, text, repairs):
    assert clean_caption(value) == (text, repairs)
    assert clean_caption(text).text == text


def test_caption_of_10000_characters_is_cut_and_counted():
    counts: Counter = Counter()
    (text,) = clean_captions(["word " * 2000], counts)
    assert len(text) <= MAX_CAPTION_CHARS and text == clean_caption(text).text
    assert counts == {"too long": 1}
    assert clean_captions("🐙" * MAX_CAPTION_CHARS, counts) == ["🐙" * MAX_CAPTION_CHARS]


def test_empty_ones_of_several_captions_are_left_out():
    counts: Counter = Counter()
    assert clean_captions(["a dog", "", None, b"a cat"], counts) == ["a dog", "a cat"]
    assert counts == {"empty": 1, "not text": 1}
    assert clean_captions(None) == []


# Data sets of any format

def test_missing_path_lists_what_was_expected(tmp_path):
    with pytest.raises(MissingFileError, match=r"nowhere: no such file or folder; expected images with .txt files"):
        open_dataset(tmp_path / "nowhere")


def test_folder_without_data_is_data_unusable(tmp_path):
    with pytest.raises(DataError, match=r"holds nothing readable \(no files\); expected"):
        open_dataset(tmp_path)
    (tmp_path / "a.png").write_bytes(PNG)
    with pytest.raises(DataError, match="holds pictures without captions"):
        open_dataset(tmp_path)
    with pytest.raises(UserError, match="is not a data set"):
        open_dataset(tmp_path / "a.png")


def test_nothing_usable_names_the_path_and_reasons(tmp_path):
    folder = write_metadata(tmp_path / "d", [{"file_name": "gone.png", "text": "x"}, "{"])
    with pytest.raises(DataError, match=r"no usable item \(1 missing file, 1 broken metadata line; first: gone"):
        open_dataset(folder)
    assert len(load_source(folder)) == 0


def test_unknown_split_of_a_source_without_splits(tmp_path):
    folder = write_metadata(tmp_path / "d", [{"file_name": "a.png", "text": "x"}])
    assert list_splits(folder) == ["train"] and len(open_dataset(folder, split="train")) == 1
    with pytest.raises(UserError, match=r"no split 'test'.*\(splits: train\)"):
        open_dataset(folder, split="test")


def test_unreachable_hub_id_is_one_line(monkeypatch):
    def refuse(*arguments, **options):
        raise ConnectionError("no\nnetwork")
    monkeypatch.setattr("datasets.get_dataset_split_names", refuse)
    with pytest.raises(MissingFileError) as caught:
        open_dataset("someone/something")
    assert "neither a local path nor a hub data set" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["metadata", "tar", "parquet"])
def test_data_survives_pickling_for_loader_workers(tmp_path, kind):
    if kind == "metadata":
        write_metadata(tmp_path, [{"file_name": "a.png", "text": "x"}])
    elif kind == "tar":
        write_tar(tmp_path / "0.tar", [("0.png", PNG), ("0.txt", b"x")])
    else:
        write_parquet(tmp_path / "train.parquet", [as_bytes(PNG)], ["x"])
    data = open_dataset(tmp_path)
    again = pickle.loads(pickle.dumps(data))
    assert again[0].captions == ["x"] and again[0].image.tobytes() == data[0].image.tobytes()


def test_bad_item_error_survives_pickling():
    error = pickle.loads(pickle.dumps(BadItemError("a: b", "no picture", "why: so")))
    assert error.reason == "no picture" and str(error) == "a: b: no picture: why: so"


def test_drop_counter_tolerates_ten_then_a_share(tmp_path):
    drops = DropCounter("d", max_bad_fraction=0.01)
    for number in range(10):
        drops.record("truncated" if number else "too small", f"{number}.png")
    assert drops.summary() == "dropped 10 of 10 (9 truncated, 1 too small)"
    with pytest.raises(DataError, match=r"d: dropped 11 of 11 .*last: 10\.png"):
        drops.record("truncated", "10.png")
    drops = DropCounter("d", max_bad_fraction=0.01)
    drops.record_good(8_997)
    for _ in range(3):
        drops.record("truncated")
    assert drops.summary() == "dropped 3 of 9,000 (3 truncated)" and drops.dropped == 3
    for _ in range(87):
        drops.record("truncated")
    with pytest.raises(DataError):
        drops.record("truncated")
    with pytest.raises(UserError, match="max_bad_fraction 2"):
        DropCounter("d", 2)
