"""Every source of captioned pictures: good items, every kind of bad item, and what is refused in one line."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.bad_images import ACCEPTED, REFUSED, encode, photo
from tokenloom_common.errors import DataError, MissingFileError, UserError
from training.data.sources.captioned_images import BAD_ITEM_ERRORS
from training.data.sources.captions import MAX_CAPTION_CHARS, clean_caption, clean_captions
from training.data.sources.drops import BadItemError, DropCounter
from training.data.sources.locate import expand_braces, split_files
from training.data.sources.open_dataset import list_splits, load_source, open_dataset

PNG = encode(photo(), "PNG")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keep what `datasets` caches out of the user's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_metadata(root: Path, lines: list[object], name: str = "metadata.jsonl") -> Path:
    """A folder with a.png, b.png and the given lines (objects as JSON, str and bytes as they are)."""
    root.mkdir(exist_ok=True)
    for stem in "ab":
        (root / f"{stem}.png").write_bytes(encode(photo(seed=ord(stem)), "PNG"))
    raw = [line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else json.dumps(line).encode()
           for line in lines]
    (root / name).write_bytes(b"\n".join(raw) + b"\n")
    return root


def write_tar(path: Path, members: list[tuple[str, bytes]], links: bool = False) -> Path:
    """A tar shard with these members, and with `links` a symbolic link and a device that pose as samples."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        if links:
            for kind, name in ((tarfile.SYMTYPE, "link.png"), (tarfile.CHRTYPE, "device.png")):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, "/etc/hostname"
                tar.addfile(info)
    return path


def write_parquet(path: Path, images: list, captions: list, **columns: list) -> Path:
    """A parquet file in the hub's own layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(images, kind), "text": captions, **columns}), path)
    return path


def as_bytes(content: bytes | None) -> dict:
    return {"bytes": content, "path": None}


# Captions

@pytest.mark.parametrize("value, text, repairs", [
    ("a  red\theart\n", "a red heart", ()), ("", "", ("empty",)), (" \n ", "", ("empty",)),
    ("a\0b", "ab", ("NUL characters",)), (b"caf\xe9", "caf�", ("not UTF-8",)), ("caf\udce9", "caf?", ("not UTF-8",)),
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


# Folders

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
    assert [data.key(i) for i in range(len(data))] == ["a.png", "b.png"]
    assert data.dropped == {"broken metadata line": 3, "no file_name": 2, "missing file": 1, "no caption": 2,
                            "path outside the folder": 7}
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
        assert list(split_files([Path(name)])) == [split], name
    assert list(split_files([Path("d/test/0.tar")], Path("d"))) == ["test"]


def test_unusable_parquet_rows_are_left_out_and_counted(tmp_path):
    images = [as_bytes(PNG), None, as_bytes(b""), as_bytes(None), {"bytes": None, "path": "/etc/hostname"},
              as_bytes(PNG)]
    write_parquet(tmp_path / "train.parquet", images, ["a dog", "x", "x", "x", "x", "  "])
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "train.parquet").read_bytes()[:300])
    data = open_dataset(tmp_path)
    assert data.dropped == {"broken parquet file": 1, "no picture": 1, "no caption": 1}
    assert data[0].captions == ["a dog"] and len(data) == 4
    reasons = []
    for index in (1, 2, 3):
        with pytest.raises(BAD_ITEM_ERRORS) as caught:
            data[index]
        reasons.append(caught.value.reason)
    assert reasons == ["empty file", "no picture", "path outside the folder"]


def test_parquet_text_that_is_not_utf8_is_repaired(tmp_path):
    buffers = pa.array([b"caf\xe9"], pa.binary()).buffers()
    write_parquet(tmp_path / "train.parquet", [as_bytes(PNG)], pa.Array.from_buffers(pa.string(), 1, buffers))
    data = open_dataset(tmp_path)
    assert data[0].captions == ["caf�"] and data.caption_repairs == {"not UTF-8": 1}


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
    with pytest.raises(UserError, match=r"no image column .*name it with image_column"):
        open_dataset(tmp_path)


def test_all_parquet_files_broken_is_data_unusable(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"none of its 1 parquet files") as caught:
        open_dataset(tmp_path)
    assert caught.value.exit_code == 4


# Webdataset

SAMPLES = [("d/0.png", PNG), ("d/0.txt", b"a dog\none dog"), ("d/0.json", b'{"caption": "other", "id": 3}'),
           ("d/1.seg.png", PNG), ("d/1.txt", b"a mask only"), ("d/2.jpg", encode(photo(), "JPEG")),
           ("d/2.json", b'{"prompt": "a cat"}'), ("d/3.txt", b"no picture"), ("d/4.png", PNG),
           ("d/4.pkl", b"cos\nsystem")]


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
    monkeypatch.setattr("training.data.sources.tar.MAX_MEMBER_BYTES", len(PNG) - 1)
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


# The door as a whole

def test_missing_path_lists_what_was_expected(tmp_path):
    with pytest.raises(MissingFileError, match=r"nowhere: no such file or folder; expected a folder with metadata"):
        open_dataset(tmp_path / "nowhere")


def test_folder_without_data_is_data_unusable(tmp_path):
    with pytest.raises(DataError, match="holds nothing readable; expected"):
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
