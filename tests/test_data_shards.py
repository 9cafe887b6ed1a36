"""Parquet files and webdataset tar shards: good items and every kind of bad item."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.source_files import (
    PNG,
    SAMPLES,
    as_bytes,
    own_cache,  # noqa: F401 (a fixture for all tests here)
    write_parquet,
    write_tar,
)
from tokenloom_common.errors import DataError, MissingFileError, UserError
from training.data.sources.captioned_images import BAD_ITEM_ERRORS
from training.data.sources.drops import BadItemError
from training.data.sources.locate import expand_braces, split_files
from training.data.sources.open_dataset import list_splits, open_dataset

# Parquet

def test_parquet_splits_follow_the_hub_convention(tmp_path):
    for split in ("train", "unseen_style"):
        for part in range(2):
            write_parquet(tmp_path / "data" / f"{split}-0000{part}-of-00002.parquet", [as_bytes(PNG)],
                          [f"{split} {part}"], style=["noto"])
    assert list_splits(tmp_path) == ["train", "unseen_style"]
    data = open_dataset(tmp_path, split="unseen_style")
    assert [data[i].captions for i in range(2)] == [["unseen_style 0"], ["unseen_style 1"]]
    assert data.metadata(0) == {"style": "noto"} and data[0].image.size == (40, 24)
    with pytest.raises(UserError, match=r"no split 'tset'.*splits: train, unseen_style") as caught:
        open_dataset(tmp_path, split="tset")
    assert caught.value.exit_code == 2


def test_split_names():
    names = {"train-00001-of-00009.parquet": "train", "my_part-00000-of-00001-0a1b.parquet": "my_part",
             "validation.parquet": "validation", "val_3.parquet": "validation", "test-0.tar": "test",
             "000.tar": "train", "trainee.parquet": "train"}
    for name, split in names.items():
        assert list(split_files([Path(name)], Path())) == [split], name
    assert list(split_files([Path("d/test/0.tar")], Path("d"))) == ["test"]


def test_unusable_parquet_rows_are_left_out_and_counted(tmp_path):
    images = [as_bytes(PNG), None, as_bytes(b""), as_bytes(None), {"bytes": None, "path": "/etc/hostname"},
              as_bytes(PNG)]
    write_parquet(tmp_path / "train.parquet", images, ["a dog", "x", "x", "x", "x", "  "])
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "train.parquet").read_bytes()[:300])
    data = open_dataset(tmp_path)
    assert data.dropped == {"broken parquet file": 1, "no picture": 2, "no caption": 1}
    assert data[0].captions == ["a dog"] and len(data) == 3
    reasons = []
    for index in (1, 2):
        with pytest.raises(BAD_ITEM_ERRORS) as caught:
            data[index]
        reasons.append(caught.value.reason)
    assert reasons == ["empty file", "path outside the folder"]


@pytest.mark.parametrize("wrong", [b"caf\xe9", "кот".encode("cp1251"), "猫".encode("cp932"), "a cat".encode("utf-16")])
def test_parquet_text_that_is_not_utf8_is_unusable(tmp_path, wrong):
    offsets = pa.array([wrong, b"a dog"], pa.binary()).buffers()
    write_parquet(tmp_path / "train.parquet", [as_bytes(PNG)] * 2, pa.Array.from_buffers(pa.string(), 2, offsets))
    data = open_dataset(tmp_path)
    assert data.all_captions() == ["a dog"] and data.caption_repairs == {"not UTF-8": 1}
    assert data.dropped == {"caption not UTF-8": 1}
    streamed = open_dataset(tmp_path, streamed_rows=1)
    with pytest.raises(BadItemError, match="caption not UTF-8") as caught:
        streamed[0]
    assert caught.value.reason == "caption not UTF-8" and streamed.captions(0) == []


def test_categories_that_are_not_utf8_are_damage(tmp_path):  # Arrow itself refuses to read them
    names = pa.Array.from_buffers(pa.string(), 2, pa.array([b"caf\xe9", b"a dog"], pa.binary()).buffers())
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0]), names)
    write_parquet(tmp_path / "train.parquet", [as_bytes(PNG)] * 3, column)
    with pytest.raises(DataError, match=r"train\.parquet cannot be read: .*Invalid UTF8"):
        open_dataset(tmp_path)
    with pytest.raises(BadItemError, match=r"broken parquet file: .*Invalid UTF8"):
        open_dataset(tmp_path, streamed_rows=1)[0]


def test_the_file_that_is_damaged_in_its_middle_is_named(tmp_path, capfd):
    for number in range(3):
        write_parquet(tmp_path / f"train-{number}.parquet", [as_bytes(PNG)] * 3, ["a"] * 3)
    content = (tmp_path / "train-1.parquet").read_bytes()
    (tmp_path / "train-1.parquet").write_bytes(content[:4] + b"\xff" * 40 + content[44:])
    with pytest.raises(DataError, match=r"train-1\.parquet cannot be read: .*") as caught:
        open_dataset(tmp_path)
    assert "\n" not in str(caught.value) and capfd.readouterr().err == ""


def test_file_names_that_are_not_utf8_are_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [as_bytes(PNG)], ["a"])
    path.rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.parquet"))
    write_parquet(tmp_path / "b.parquet", [as_bytes(PNG)], ["b"])
    for rows in (0, 1):
        with pytest.raises(UserError, match=r"\\udcff.parquet': a name that is not UTF-8; rename it"):
            open_dataset(tmp_path, streamed_rows=rows)


def test_a_caption_that_is_not_utf8_costs_only_itself(tmp_path):
    values = pa.Array.from_buffers(pa.string(), 2, pa.array([b"caf\xe9", b"a dog"], pa.binary()).buffers())
    write_parquet(tmp_path / "train.parquet", [as_bytes(PNG)], pa.ListArray.from_arrays(pa.array([0, 2]), values))
    for rows in (0, 1):
        data = open_dataset(tmp_path, streamed_rows=rows)
        assert data[0].captions == ["a dog"] and not data.dropped


def test_replaced_parquet_file_is_noticed_even_with_the_same_time_and_name(tmp_path):
    path = write_parquet(tmp_path / "train.parquet", [as_bytes(PNG)], ["old"])
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    assert open_dataset(path)[0].captions == ["old"]
    path.unlink()
    write_parquet(path, [as_bytes(PNG)], ["a newer caption"])
    os.utime(path, ns=times)
    assert open_dataset(path)[0].captions == ["a newer caption"]


def test_wrong_columns_are_refused_with_the_list_of_columns(tmp_path):
    write_parquet(tmp_path / "train.parquet", [as_bytes(PNG)], ["x"])
    with pytest.raises(UserError, match=r"no column 'txet'; did you mean 'text'\? \(columns: image, text\)"):
        open_dataset(tmp_path, caption_column="txet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"no image column .*name it with --data\.image_column"):
        open_dataset(tmp_path)


def test_all_parquet_files_broken_is_data_unusable(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"none of its 1 parquet files") as caught:
        open_dataset(tmp_path)
    assert caught.value.exit_code == 4


# Webdataset

def test_tar_samples_are_grouped_by_key_and_read_in_place(tmp_path):
    write_tar(tmp_path / "000.tar", SAMPLES, links=True)
    data = open_dataset(tmp_path)
    assert [(data[i].key, data[i].captions) for i in range(len(data))] == [
        ("000.tar:d/0", ["a dog", "one dog"]), ("000.tar:d/2", ["a cat"])]
    assert data.metadata(0) == {"caption": "other", "id": 3} and data[1].image.size == (40, 24)
    assert data.dropped == {"no picture": 2, "no caption": 1}
    assert open_dataset(tmp_path, caption_column="caption")[0].captions == ["other"]
    assert open_dataset(tmp_path, image_column="seg.png").captions(0) == ["a mask only"]


@pytest.mark.parametrize("damage, reason", [
    (lambda whole: whole[:len(whole) // 2], "truncated tar"), (lambda whole: whole[:1536 + 5120], "truncated tar"),
    (lambda whole: whole[:512] + PNG[:40] * 200, "broken tar"), (lambda whole: b"", "broken tar"),
    (lambda whole: b"not a tar" * 400, "broken tar")])
def test_damaged_tar_costs_only_what_lies_behind_the_damage(tmp_path, damage, reason):
    write_tar(tmp_path / "0.tar", [(f"{n}.{kind}", content) for n in range(8)
                                   for kind, content in (("txt", b"a dog"), ("png", PNG))])
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(damage(whole))
    data = open_dataset(tmp_path)
    assert len(data) >= 8 and data.dropped[reason] == 1
    assert all(data[i].captions == ["a dog"] and data[i].image.size == (40, 24) for i in range(len(data)))


def test_tar_with_a_damaged_header_in_the_middle_is_counted(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("0.png", PNG), ("0.txt", b"a dog"), ("1.png", PNG), ("1.txt", b"a cat")])
    with tarfile.open(path) as tar:
        start = tar.getmember("1.png").offset
    content = bytearray(path.read_bytes())
    content[start:start + 512] = b"\x55" * 512
    path.write_bytes(content)
    data = open_dataset(path)
    assert [data.captions(i) for i in range(len(data))] == [["a dog"]] and data.dropped == {"broken tar": 1}


def test_oversized_member_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr("training.data.sources.tars.tar.MAX_MEMBER_BYTES", len(PNG) - 1)
    write_tar(tmp_path / "0.tar", [("0.png", PNG), ("0.txt", b"x"), ("1.png", PNG[:50]), ("1.txt", b"y")])
    assert open_dataset(tmp_path).dropped == {"member too large": 1}


def test_shard_that_shrinks_after_opening_is_an_item_error(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("0.png", PNG), ("0.txt", b"x")])
    data = open_dataset(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(BadItemError, match="shorter than when it was opened"):
        data[0]
    path.unlink()
    with pytest.raises(BadItemError, match="missing shard"):
        data[0]


def test_brace_expression_names_shards_and_the_missing_ones(tmp_path):
    for number in (8, 9, 10):
        write_tar(tmp_path / f"{number:03d}.tar", [("0.png", PNG), ("0.txt", f"{number}".encode())])
    data = open_dataset(f"{tmp_path}/{{008..010}}.tar")
    assert [data.captions(i) for i in range(3)] == [["8"], ["9"], ["10"]]
    with pytest.raises(MissingFileError, match=r"1 of 4 shards are missing .*011\.tar"):
        open_dataset(f"{tmp_path}/{{008..011}}.tar")
    assert expand_braces("{a,b}-{9..11}") == ["a-9", "a-10", "a-11", "b-9", "b-10", "b-11"]
    for wrong in ("{3..1}.tar", "{x}.tar"):
        with pytest.raises(UserError, match="cannot read"):
            expand_braces(wrong)
