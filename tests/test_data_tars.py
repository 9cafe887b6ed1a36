"""Tar shards as people pack them: any order of members, any compression, any kind of caption."""

from __future__ import annotations

import bz2
import errno
import gc
import gzip
import lzma
import os
import shutil
import tarfile
from collections import namedtuple
from pathlib import Path

import pytest

from tests.bad_images import encode, photo
from tests.source_files import (
    PNG,
    own_cache,  # noqa: F401 (a fixture for all tests here)
    write_tar,
)
from tokenloom_common.errors import DataError, RunFailedError, UserError
from training.data.sources.open_dataset import load_source, open_dataset
from training.data.sources.tars import archives, tar_index
from training.data.sources.tars import tar as tar_source

PICTURES = [encode(photo(seed=seed), "PNG") for seed in range(6)]
PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def both(path: Path, **options) -> list[dict[str, list[str]]]:
    """Captions by key, of tars whose headers are read at every start and of those with an index; all pictures are read."""
    found = []
    for rows in (0, 1, 1):
        data = open_dataset(path, streamed_rows=rows, **options)
        found.append({data[row].key: data[row].captions for row in range(len(data))})
        assert data.chunk_bounds is None or data.chunk_bounds[-1] == len(data)
    assert found[0] == found[1] == found[2]
    return found[0]


def dropped(path: Path, **options) -> dict[str, int]:
    cached, streamed = load_source(path, **options), load_source(path, streamed_rows=1, **options)
    assert cached.bad_items == streamed.bad_items and cached.left_out == streamed.left_out
    return dict(cached.dropped)


# The order and names of members

PAIRS = [(f"f/{n}.png", picture) for n, picture in enumerate(PICTURES)]
TEXTS = [(f"f/{n}.txt", f"picture {n}".encode()) for n in range(6)]


@pytest.mark.parametrize("members", [
    [*PAIRS, *TEXTS], [*TEXTS, *PAIRS], [*PAIRS, *TEXTS[::-1]], [*TEXTS[3:], *PAIRS, *TEXTS[:3]],
    [member for pair in zip(PAIRS, TEXTS[1:] + TEXTS[:1], strict=True) for member in pair]])
def test_members_are_grouped_by_name_whatever_their_order(tmp_path, members):
    write_tar(tmp_path / "0.tar", members)
    found = both(tmp_path)
    assert found == {f"0.tar:f/{n}": [f"picture {n}"] for n in range(6)}
    first_seen = list(dict.fromkeys(f"0.tar:{name.partition('.')[0]}" for name, _ in members))
    assert list(found) == first_seen


def test_equal_names_in_other_folders_and_shards_are_other_items(tmp_path):
    for shard in ("0.tar", "1.tar"):
        texts = [(f"{d}/0.txt", f"{shard} {d}".encode()) for d in "ab"]
        write_tar(tmp_path / shard, [("a/0.png", PNG), ("b/0.png", PNG), *texts])
    assert both(tmp_path) == {f"{shard}:{d}/0": [f"{shard} {d}"] for shard in ("0.tar", "1.tar") for d in "ab"}


def test_leading_dots_are_no_part_of_a_name(tmp_path):
    write_tar(tmp_path / "0.tar", [("./0.png", PNG), ("0.txt", b"a"), ("./d//1.png", PNG), ("d/./1.txt", b"b"),
                                   ("././2.png", PNG), ("./2.txt", b"c")])
    assert both(tmp_path) == {"0.tar:0": ["a"], "0.tar:d/1": ["b"], "0.tar:2": ["c"]}


def test_a_name_that_comes_twice_is_counted(tmp_path):
    write_tar(tmp_path / "0.tar", [("0.png", PNG), ("0.txt", b"a"), ("0.png", PICTURES[1]), ("./0.TXT", b"b")])
    assert both(tmp_path) == {"0.tar:0": ["a"]}
    assert dropped(tmp_path) == {"name that comes twice": 2}


@pytest.mark.parametrize("members, expected", [
    (["10.1.jpg", "10.1.txt", "10.2.jpg", "10.2.txt"], ["10.1", "10.2"]),
    (["v1.0/img.2024.01.31.png", "v1.0/img.2024.01.31.txt"], ["v1.0/img.2024.01.31"]),
    (["a.png", "a.seg.png", "a.txt"], ["a"]), (["a.seg.png", "a.txt", "a.png"], ["a"]),
    (["a.jpg", "a.txt", "a.1.jpg", "a.1.txt", "a.mask.png"], ["a", "a.1"]),
    (["P.Jan.1.JPG", "P.Jan.1.txt", "P.jan.1.jpg", "P.jan.1.TXT"], ["P.Jan.1", "P.jan.1"]),
    (["a.b.jpg", "a.b.cls"], ["a.b"]), (["0.5.webp", "0.5.json"], ["0.5"])])
def test_dots_in_names(tmp_path, members, expected):
    content = {"txt": b"x", "cls": b"7", "json": b'{"text": "x"}'}
    write_tar(tmp_path / "0.tar", [(name, content.get(name.rpartition(".")[2].lower(), PNG)) for name in members])
    assert list(both(tmp_path)) == [f"0.tar:{key}" for key in expected]
    assert dropped(tmp_path) == {}


def test_what_macos_adds_is_passed_over(tmp_path):
    write_tar(tmp_path / "0.tar", [("._0.png", b"x"), ("0.png", PNG), ("._0.txt", b"\0"), ("0.txt", b"a"), ("d/._1.jpg", b""),
                                   (".DS_Store", b""), ("__MACOSX/0.png", b"x"), ("__MACOSX/d/1.txt", b"x")])
    assert both(tmp_path) == {"0.tar:0": ["a"]} and dropped(tmp_path) == {}


@pytest.mark.parametrize("ending, kind", [("gif", "GIF"), ("bmp", "BMP"), ("GIF", "GIF"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_every_ending_of_a_picture_is_read(tmp_path, ending, kind):
    write_tar(tmp_path / "0.tar", [(f"0.{ending}", encode(photo(), kind)), ("0.txt", b"a")])
    assert both(tmp_path) == {"0.tar:0": ["a"]}


def test_no_header_is_kept_of_many_members(tmp_path, monkeypatch):
    write_tar(tmp_path / "0.tar", [(f"{n}.{kind}", b"x") for kind in ("png", "txt") for n in range(500)])
    kept = []
    next_whole = tar_source._next_whole

    def count(*arguments):
        member = next_whole(*arguments)
        if member is None:  # at the end of the shard
            kept.append(sum(type(one) is tarfile.TarInfo for one in gc.get_objects()))
        return member

    monkeypatch.setattr(tar_source, "_next_whole", count)
    assert len(open_dataset(tmp_path)) == 500 and kept[0] < 10


def test_a_caption_file_that_is_too_large_is_named(tmp_path):
    members = [("0.png", PNG), ("0.txt", "猫".encode() * (1 << 19)), ("1.png", PNG), ("1.txt", b"a")]
    write_tar(tmp_path / "0.tar", members)
    assert both(tmp_path) == {"0.tar:1": ["a"]} and dropped(tmp_path) == {"caption file too large": 1}


# Captions

UTF16 = "красный кот".encode("utf-16")


@pytest.mark.parametrize("members, options, captions", [
    ({"txt": b"a\r\nb\n"}, {}, ["a", "b"]), ({"caption": b"a"}, {}, ["a"]), ({"txt": b"a", "caption": b"b"}, {}, ["a"]),
    ({"txt": b" \n", "caption": b"b"}, {}, ["b"]),
    ({"tags": b"1girl, cat", "txt": b"x"}, {"caption_ending": ".TAGS"}, ["1girl, cat"]),
    ({"wd14.txt": b"t", "txt": b"x"}, {"caption_ending": "wd14.txt"}, ["t"]),
    ({"txt": b"", "json": b'{"caption": "j"}'}, {}, ["j"]), ({"json": b'{"caption": ["j", "k"]}', "cls": b"3"}, {}, ["j", "k"]),
    ({"cls": b"3\n"}, {}, ["3"]), ({"label": b"tench"}, {}, ["tench"]), ({"class": "猫".encode()}, {}, ["猫"]),
    ({"cls": b"3", "json": b'{"id": 4}'}, {}, ["3"]), ({"cls": b"3", "txt": b"a"}, {"caption_column": "cls"}, ["3"]),
    ({"txt": UTF16}, {}, ["красный кот"]), ({"cls": "кот".encode("utf-16")}, {}, ["кот"]),
    ({"txt": "кот".encode("cp1251")}, {"encoding": "cp1251"}, ["кот"]),
    ({"json": '{"text": "кот"}'.encode("utf-16")}, {}, ["кот"]), ({"json": b'\xef\xbb\xbf{"text": "a"}'}, {}, ["a"]),
    ({"json": '{"text": "café"}'.encode("latin-1")}, {"encoding": "latin-1"}, ["café"]),
    ({"txt": "a\u2028b\x0cc".encode()}, {}, ["a b c"])])
def test_captions_of_a_sample(tmp_path, members, options, captions):
    write_tar(tmp_path / "0.tar", [("0.png", PNG), *((f"0.{name}", content) for name, content in members.items())])
    assert both(tmp_path, **options) == {"0.tar:0": captions} and dropped(tmp_path, **options) == {}


@pytest.mark.parametrize("name, content", [
    ("txt", "кот".encode("cp1251")), ("caption", b"caf\xe9"), ("cls", b"\xff\xfe\xfd"),
    ("json", '{"text": "café"}'.encode("latin-1")),
    ("txt", "猫".encode("shift_jis"))])
def test_captions_that_are_no_text_are_unusable(tmp_path, name, content):
    write_tar(tmp_path / "0.tar", [("0.png", PNG), (f"0.{name}", content), ("1.png", PNG), ("1.txt", b"a")])
    assert both(tmp_path) == {"0.tar:1": ["a"]}
    (reason, count), = dropped(tmp_path).items()
    assert reason.startswith("caption not UTF-") and count == 1


def test_a_json_that_is_no_text_costs_no_caption_beside_it(tmp_path):
    write_tar(tmp_path / "0.tar", [("0.png", PNG), ("0.txt", b"a"), ("0.json", b'{"x": "caf\xe9"}')])
    assert both(tmp_path) == {"0.tar:0": ["a"]}
    assert load_source(tmp_path).caption_repairs == {"broken json beside a picture": 1}


def test_failed_downloads_are_left_out(tmp_path):
    failed = b'{"status": "failed_to_download", "error_message": "HTTP Error 404", "caption": "x"}'
    write_tar(tmp_path / "0.tar", [("0.jpg", PNG), ("0.txt", b"a"), ("0.json", b'{"status": "success"}'), ("1.json", failed),
                                   ("2.txt", b"c"), ("2.json", b'{"status": "failed_to_resize"}'), ("3.txt", b"no json"),
                                   ("4.json", b'{"status": "success"}'), ("5.json", b'{"error_message": "timeout"}')])
    assert list(both(tmp_path)) == ["0.tar:0"]
    assert dropped(tmp_path) == {"no picture": 2} and load_source(tmp_path).left_out == {"downloads failed": 3}


# Splits in one shard

@pytest.mark.parametrize("first, second", [
    ("train", "val"), ("Training", "test"), ("d/train", "d/validation"), ("train2017", "val2017")])
def test_splits_in_one_tar_are_never_mixed(tmp_path, first, second):
    write_tar(tmp_path / "0.tar", [(f"{d}/{n}.{kind}", content) for n, d in enumerate((first, second))
                                   for kind, content in (("png", PNG), ("txt", b"a"))])
    for rows in (0, 1, 1):
        with pytest.raises(UserError, match=f"{first}/ and 0.tar:{second}/: pack each split") as caught:
            open_dataset(tmp_path, streamed_rows=rows)
        assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_splits_in_shards_that_are_read_together_are_never_mixed(tmp_path):
    for shard, folder in (("0.tar", "train"), ("1.tar", "val")):
        write_tar(tmp_path / shard, [(f"{folder}/0.png", PNG), (f"{folder}/0.txt", b"a")])
    write_tar(tmp_path / "2.tar", [("0.png", PNG), ("0.txt", b"a")])
    for paths in (tmp_path, f"{tmp_path}/{{1..2}}.tar"):
        for rows in (0, 1, 1):
            with pytest.raises(UserError, match=r"different splits, .*val/"):
                open_dataset(paths, streamed_rows=rows)
    assert list(both(f"{tmp_path}/{{0,2}}.tar")) == ["0.tar:train/0", "2.tar:0"]


# Compressed shards

@pytest.mark.parametrize("ending", [".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar"])
@pytest.mark.parametrize("kind", PACK)
def test_compressed_shards_are_known_by_their_content(tmp_path, ending, kind):
    plain = write_tar(tmp_path / "plain", [*PAIRS, *TEXTS])
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / f"0{ending}").write_bytes(PACK[kind](plain.read_bytes()))
    assert both(tmp_path / "d") == {f"0{ending}:f/{n}": [f"picture {n}"] for n in range(6)}


def test_a_plain_tar_with_the_ending_of_a_compressed_one_is_read_in_place(tmp_path):
    write_tar(tmp_path / "0.tar.gz", [*PAIRS, *TEXTS])
    data = open_dataset(tmp_path)
    assert len(data) == 6 and data.dataset[0]["shard"] == str(tmp_path / "0.tar.gz")


def test_a_shard_is_unpacked_once_while_it_is_unchanged(tmp_path, monkeypatch):
    path = tmp_path / "0.tgz"
    path.write_bytes(gzip.compress(write_tar(tmp_path / "x", [*PAIRS, *TEXTS]).read_bytes()))
    unpacked = []
    unpack = archives._unpack
    monkeypatch.setattr(archives, "_unpack", lambda shard, *more: unpacked.append(shard) or unpack(shard, *more))
    identities = {open_dataset(path).identity() for _ in range(2)}
    assert len(unpacked) == 1 and len(both(path)) == 6 and len(unpacked) == 1
    # what is removed from the cache is made again, also where the index is still there
    for file in archives.tar_folder().glob("*.tar"):
        file.unlink()
    assert len(open_dataset(path, streamed_rows=1)) == 6 and open_dataset(path, streamed_rows=1)[0].captions == ["picture 0"]
    assert identities == {open_dataset(path).identity()} and len(unpacked) == 2
    path.write_bytes(gzip.compress(write_tar(tmp_path / "x", [*PAIRS[:2], *TEXTS]).read_bytes()))
    assert len(both(path)) == 2 and len(unpacked) == 3
    assert not list(archives.tar_folder().glob("*.tmp"))


@pytest.mark.parametrize("damage", [
    lambda packed: packed[:len(packed) // 2], lambda packed: packed[:20],
    lambda packed: packed[:60] + b"\x55" * 80 + packed[140:], lambda packed: packed[:-6] + b"\x01" * 6])
@pytest.mark.parametrize("kind", PACK)
def test_a_broken_archive_is_named(tmp_path, damage, kind):
    write_tar(tmp_path / "0.tar", [("0.png", PNG), ("0.txt", b"a")])
    packed = PACK[kind]((tmp_path / "0.tar").read_bytes())
    (tmp_path / "1.tar").write_bytes(damage(packed))
    for _ in range(2):  # nothing half unpacked is taken for whole
        assert list(both(tmp_path)) == ["0.tar:0"] and dropped(tmp_path) == {"broken archive": 1}
    with pytest.raises(DataError, match=r"1 broken archive; first: 1\.tar"):
        open_dataset(tmp_path / "1.tar")
    assert not list(archives.tar_folder().glob("*.t*"))


def test_other_content_in_an_archive_is_a_broken_tar(tmp_path):
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(b"<html>not found</html>"))
    (tmp_path / "1.tar").write_bytes(b"PK\3\4 a zip")
    assert dropped(tmp_path) == {"broken tar": 2}


def test_a_full_disk_is_named_before_and_while_unpacking(tmp_path, monkeypatch):
    path = tmp_path / "0.tar.gz"
    path.write_bytes(gzip.compress(write_tar(tmp_path / "x", [*PAIRS, *TEXTS]).read_bytes()))

    def fill(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", fill)
        with pytest.raises(RunFailedError, match=r"is full: .* free, .* more once .*, or unpack the shards yourself"):
            open_dataset(path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(10))
        with pytest.raises(RunFailedError, match=r"is full: 0\.0 MB free"):
            open_dataset(path, streamed_rows=1)
    assert len(open_dataset(path)) == 6


def test_an_index_that_cannot_be_kept_is_held_in_memory(tmp_path, monkeypatch, caplog, capfd):
    import datasets

    (tmp_path / "file").write_text("")
    write_tar(tmp_path / "0.tar", [*PAIRS, *TEXTS, ("x.json", b'{"status": "failed"}')])
    expected = open_dataset(tmp_path / "0.tar", streamed_rows=1)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    held = open_dataset(tmp_path / "0.tar", streamed_rows=1)
    assert held.all_captions() == expected.all_captions() and held.identity() == expected.identity()
    assert held.left_out == {"downloads failed": 1}
    assert held[5].image.tobytes() == expected[5].image.tobytes()
    assert not caplog.records and capfd.readouterr() == ("", "")
    # a compressed one has to be unpacked somewhere
    (tmp_path / "1.tgz").write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    with pytest.raises(RunFailedError, match=r"cannot be written \(not a directory\): set HF_HOME .*, or unpack the shards"):
        open_dataset(tmp_path / "1.tgz", streamed_rows=1)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_disk_that_is_full_costs_no_index(tmp_path, monkeypatch, code):
    write_tar(tmp_path / "0.tar", [*PAIRS, *TEXTS])

    def fail(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tar_index, "sync_path", fail)
    assert open_dataset(tmp_path, streamed_rows=1)[5].captions == ["picture 5"]


def test_an_archive_of_several_streams_is_one_tar(tmp_path):  # as pigz and bgzip write them
    plain = write_tar(tmp_path / "x", [*PAIRS, *TEXTS]).read_bytes()
    half = len(plain) // 2
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(plain[:half]) + gzip.compress(plain[half:]))
    assert len(both(tmp_path / "0.tar.gz")) == 6
