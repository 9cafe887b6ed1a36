"""The cache of `datasets`: paths are names and never patterns, and a cache that fails is named as such."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from tests.source_files import (
    PNG,
    as_bytes,
    own_cache,  # noqa: F401 (a fixture for all tests here)
    write_parquet,
)
from tokenloom_common.errors import DataError, MissingFileError, RunFailedError, run_command
from training.commands.data import main
from training.data.sources.open_dataset import open_dataset
from training.data.sources.tables import parquet_copy

NAMES = ["set [12]", "set [!a]", "a*b", "q?", "{a,b}", "**", "x::y", "zip::a", "~", "~root", "#1", "100%41", "it's", "file:",
         "hf:", "ünï 猫", "a\nb", "[[]", " blanks "]


@pytest.mark.parametrize("name", NAMES)
def test_names_with_signs_of_patterns_are_names(tmp_path, name):
    # what each would match if it were a pattern
    for other in ("set 1", "set b", "aXb", "qx", "a", "b", "[", "x"):
        write_parquet(tmp_path / other / f"{other}.parquet", [as_bytes(PNG)], ["not mine"])
    file = write_parquet(tmp_path / name / f"{name}.parquet", [as_bytes(PNG)] * 2, ["mine", "mine too"])
    for path in (file.parent, file):
        assert open_dataset(path).all_captions() == ["mine", "mine too"]
        assert open_dataset(path, streamed_rows=1).all_captions() == ["mine", "mine too"]


def test_the_cache_itself_may_lie_below_such_a_name(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home [1]" / "a*b")
    write_parquet(tmp_path / "d [2]" / "train.parquet", [as_bytes(PNG)], ["mine"])
    assert [open_dataset(tmp_path / "d [2]").all_captions() for _ in range(2)] == [["mine"]] * 2


def test_relative_paths_and_links_are_copied_once(tmp_path, monkeypatch):
    write_parquet(tmp_path / "d" / "train.parquet", [as_bytes(PNG)], ["mine"])
    (tmp_path / "link [1].parquet").symlink_to(tmp_path / "d" / "train.parquet")
    monkeypatch.chdir(tmp_path)
    for path in ("d", "./d/train.parquet", "link [1].parquet"):
        assert open_dataset(path).all_captions() == ["mine"]
    copies = list((Path(parquet_copy.cache_folder()) / "parquet").glob("tokenloom-*"))
    assert len([path for path in copies if path.is_dir()]) == 1
    assert not list(Path(parquet_copy.cache_folder()).glob("tokenloom-*"))  # the links are gone


def test_a_copy_with_other_rows_than_the_files_is_refused(tmp_path, monkeypatch):
    write_parquet(tmp_path / "train.parquet", [as_bytes(PNG)] * 3, ["a", "b", "c"])
    load = parquet_copy._load
    monkeypatch.setattr(parquet_copy, "_load", lambda *more: load(*more).select([0, 1]))
    with pytest.raises(RunFailedError, match=r"hold 3 rows and their copy in .* 2; remove that copy"):
        open_dataset(tmp_path)


# A cache that cannot be written or is full

@pytest.fixture
def blocked_cache(tmp_path, monkeypatch):
    """A cache below a file, which not even root can write."""
    import datasets

    (tmp_path / "home").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home" / "cache")
    return tmp_path / "home" / "cache"


def test_a_cache_that_cannot_be_written_is_named(tmp_path, blocked_cache, capsys):
    write_parquet(tmp_path / "d" / "train.parquet", [as_bytes(PNG)], ["a dog"])
    assert run_command(main, ["check", str(tmp_path / "d")], "data") == 1
    line, = capsys.readouterr().err.splitlines()
    assert line == (f"data: error: the cache of datasets at {blocked_cache} cannot be written (not a directory): set HF_HOME "
                    "to a folder that can, or --data.streaming true")
    assert open_dataset(tmp_path / "d", streamed_rows=1).all_captions() == ["a dog"]
    with pytest.raises(RunFailedError, match="cannot be written") as caught:
        open_dataset("someone/something")
    assert "streaming" not in str(caught.value)  # of the hub there is none


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_what_the_system_says_of_the_cache_is_passed_on(tmp_path, monkeypatch, code):
    write_parquet(tmp_path / "train.parquet", [as_bytes(PNG)], ["a dog"])

    def refuse(*_, dir, **__):
        raise OSError(code, os.strerror(code), str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(RunFailedError, match=rf"cannot be written \({os.strerror(code).lower()}\): set HF_HOME"):
        open_dataset(tmp_path)


def test_too_little_room_is_found_before_the_copy(tmp_path, monkeypatch):
    write_parquet(tmp_path / "train.parquet", [as_bytes(PNG * 100)], ["a dog"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(10))
    monkeypatch.setattr("datasets.DatasetBuilder.download_and_prepare", lambda self: pytest.fail("the copy was begun"))
    with pytest.raises(RunFailedError, match=r"is full: 0\.0 MB free, these files take 0\.\d MB; set HF_HOME .*streaming true"):
        open_dataset(tmp_path)


def test_a_copy_that_is_there_needs_no_room(tmp_path, monkeypatch):
    write_parquet(tmp_path / "train.parquet", [as_bytes(PNG)], ["a dog"])
    open_dataset(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(0))
    assert open_dataset(tmp_path).all_captions() == ["a dog"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_during_the_copy_is_the_caches(tmp_path, monkeypatch, code):
    from datasets.exceptions import DatasetGenerationError

    write_parquet(tmp_path / "train.parquet", [as_bytes(PNG)], ["a dog"])

    def fill(self):
        try:
            raise OSError(code, os.strerror(code))
        except OSError as error:
            raise DatasetGenerationError("An error occurred") from error

    monkeypatch.setattr("datasets.DatasetBuilder.download_and_prepare", fill)
    with pytest.raises(RunFailedError, match=r"the cache of datasets at .* is full: .* free, these files take more once"):
        open_dataset(tmp_path)


def test_a_file_that_cannot_be_read_is_not_blamed_on_the_cache(tmp_path, monkeypatch):
    write_parquet(tmp_path / "train.parquet", [as_bytes(PNG)], ["a dog"])

    def refuse(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "train.parquet"))

    monkeypatch.setattr("datasets.DatasetBuilder.download_and_prepare", refuse)
    with pytest.raises(DataError, match=r"one of its parquet files cannot be read: .*permission denied"):
        open_dataset(tmp_path)


def test_the_hubs_own_cache_is_named_too(monkeypatch):
    from datasets import config

    def refuse(name):
        raise PermissionError(errno.EACCES, "Permission denied", str(Path(config.HF_CACHE_HOME, "hub", "datasets--a--b")))

    monkeypatch.setattr("datasets.get_dataset_split_names", refuse)
    with pytest.raises(RunFailedError, match=r"cannot be written \(permission denied\): set HF_HOME"):
        open_dataset("someone/something")
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda name: 1 / 0)
    with pytest.raises(MissingFileError, match="neither a local path"):
        open_dataset("someone/something")
