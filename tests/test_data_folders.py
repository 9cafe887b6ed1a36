"""Folders of captioned pictures: good items and every kind of bad item."""

from __future__ import annotations

import json
import os

import pytest

from tests.bad_images import ACCEPTED, REFUSED
from tests.source_files import (
    PNG,
    own_cache,  # noqa: F401 (a fixture for all tests here)
    write_metadata,
)
from training.data.sources.captioned_images import BAD_ITEM_ERRORS
from training.data.sources.open_dataset import list_splits, open_dataset


def test_metadata_folder_gives_images_captions_and_other_columns(tmp_path):
    data = open_dataset(write_metadata(tmp_path / "d", [
        {"file_name": "a.png", "text": "a dog", "id": 7}, {"file_name": "b.png", "text": ["a cat", "one cat"]}]))
    assert len(data) == 2 and data[0].image.size == (40, 24) and data[0].image.mode == "RGB"
    assert [data[0].captions, data[-1].captions] == [["a dog"], ["a cat", "one cat"]]
    assert data[0].key == "a.png" and data.columns == ["id"] and data.metadata(0) == {"id": 7}
    assert data.dataset.num_rows == 2 and not data.dropped
    with pytest.raises(IndexError, match="no item 2"):
        data[2]


@pytest.mark.parametrize("column", ["text", "captions", "caption", "prompt"])
def test_usual_caption_columns_are_found(tmp_path, column):
    folder = write_metadata(tmp_path / "d", [{"file_name": "a.png", column: "a dog", "other": "x"}])
    assert open_dataset(folder)[0].captions == ["a dog"]
    assert open_dataset(folder, caption_column="other")[0].captions == ["x"]


def test_bad_metadata_lines_are_counted_by_reason(tmp_path):
    (tmp_path / "secret.png").write_bytes(PNG)
    folder = write_metadata(tmp_path / "d", [
        {"file_name": "a.png", "text": "a dog"}, '{"file_name": "b.png", "text": "cut', "[1, 2]", "", "[" * 100_000,
        {"text": "no name"}, {"file_name": 3, "text": "x"}, {"file_name": "gone.png", "text": "x"},
        {"file_name": "b.png", "text": " "}, {"file_name": "b.png"}, b'{"file_name": "b.png", "text": "caf\xe9"}',
        {"file_name": "../secret.png", "text": "x"}, {"file_name": str(tmp_path / "secret.png"), "text": "x"},
        {"file_name": "file:///etc/hostname", "text": "x"}, {"file_name": "link.png", "text": "x"},
        {"file_name": str(tmp_path / "d" / "a.png"), "text": "x"},
        {"file_name": "..\\secret.png", "text": "x"}, {"file_name": "a\0.png", "text": "x"}])
    os.symlink(tmp_path / "secret.png", folder / "link.png")
    data = open_dataset(folder)
    assert [data.key(i) for i in range(len(data))] == ["a.png"]
    assert data.dropped == {"broken metadata line": 3, "no file_name": 2, "missing file": 1, "no caption": 2,
                            "line not UTF-8": 1, "path outside the folder": 7}
    assert data.bad_items[0] == ("metadata.jsonl line 2", "broken metadata line")


def test_overlong_metadata_line_costs_that_line_only(tmp_path):
    folder = write_metadata(tmp_path / "d", [b'{"file_name": "a.png", "text": "' + b"x" * 3_000_000 + b'"}',
                                             {"file_name": "b.png", "text": "a cat"}])
    data = open_dataset(folder)
    assert [data[0].captions, dict(data.dropped)] == [["a cat"], {"line too long": 1}]


def test_csv_metadata_is_read(tmp_path):
    folder = write_metadata(tmp_path / "d", ["file_name,caption,mood", 'a.png,"a dog, sitting",calm', "gone.png,x,y"],
                            "metadata.csv")
    data = open_dataset(folder)
    assert data[0].captions == ["a dog, sitting"] and data.metadata(0) == {"mood": "calm"}
    assert data.dropped == {"missing file": 1}


def test_sidecars_match_within_their_own_folder(tmp_path):
    for folder, caption in (("x", b"a dog\n\none dog\n"), ("y", b"a cat")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.PNG").write_bytes(PNG)
        (tmp_path / folder / "1.txt").write_bytes(caption)
    (tmp_path / "alone.png").write_bytes(PNG)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "void.png").write_bytes(PNG)
    (tmp_path / "void.txt").write_bytes(b"\n \n")
    data = open_dataset(tmp_path)
    assert {data.key(i): data.captions(i) for i in range(len(data))} == {"x/1.PNG": ["a dog", "one dog"],
                                                                         "y/1.PNG": ["a cat"]}
    assert data.dropped == {"no caption file": 1, "no picture for the caption file": 1, "no caption": 1}


def test_every_difficult_picture_is_read_and_every_broken_one_refused_by_reason(tmp_path):
    lines = []
    for number, content in enumerate([*ACCEPTED.values(), *(content for content, _ in REFUSED.values())]):
        (tmp_path / f"{number}.png").write_bytes(content)
        lines.append(json.dumps({"file_name": f"{number}.png", "text": "x"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    data = open_dataset(tmp_path)
    reasons = []
    for index in range(len(data)):
        try:
            assert data[index].image.mode == "RGB"
        except BAD_ITEM_ERRORS as error:
            assert data.key(index) in str(error)
            reasons.append(error.reason)
    assert reasons == [reason for _, reason in REFUSED.values()]


def test_folders_named_train_and_test_are_splits(tmp_path):
    for split in ("train", "test"):
        write_metadata(tmp_path / split, [{"file_name": "a.png", "text": split}])
    assert list_splits(tmp_path) == ["test", "train"]
    assert open_dataset(tmp_path)[0].captions == ["train"]
    assert open_dataset(tmp_path, split="test")[0].captions == ["test"]
