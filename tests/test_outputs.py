"""The place of a command's results is checked before the work, and the check leaves nothing behind."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tokenloom_common.errors import UserError
from tokenloom_common.outputs import check_output_file, check_output_folder


def everything(folder):
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.fixture
def place(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "to-file").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


BAD_FOLDERS = {
    "": "is empty; give a folder",
    "{}/file": "is a file; give a folder",
    "{}/to-file": "is a file; give a folder",
    "{}/pipe": "is a file; give a folder",
    "{}/file/a/b": "file is a file",
    "{}/dangling": "is a link to .*/nowhere, which does not exist",
    "{}/dangling/sub": "dangling is a link to nothing",
    "{}/a\0b": "null byte",
    "{}/" + "n" * 300: "name too long",
    "{}/new/" + "n" * 300 + "/below": "name too long",
    "{}/" + "n" * 245: "name too long",  # fits itself, but not the name that it is written under first
    "/proc/tokens": "nothing can be made in /proc",
    "/sys/a/b": "nothing can be made in /sys",
}


@pytest.mark.parametrize("own", [None, ("*.json",)])
@pytest.mark.parametrize(("name", "message"), BAD_FOLDERS.items(), ids=list(BAD_FOLDERS.values()))
def test_a_folder_that_cannot_be_written_is_refused_and_nothing_is_made(place, name, message, own):
    if own is None and name.endswith("n" * 245):
        return  # files are added under names of their own
    before = everything(place)
    with pytest.raises(UserError, match=rf"(?s)^--out .*{message}") as raised:
        check_output_folder("--out", name.format(place), own)
    assert len(str(raised.value).splitlines()) == 1
    assert everything(place) == before


BAD_FILES = {
    "": "is empty; give a file",
    "{}/full": "is a folder; give a file",
    "{}/pipe": "is no regular file",
    "/dev/null": "is no regular file",
    "{}/file/report.json": "file is a file",
    "{}/dangling": "which does not exist",
    "{}/" + "n" * 250 + ".json": "name too long",
    "/proc/report.json": "nothing can be made in /proc",
}


@pytest.mark.parametrize(("name", "message"), BAD_FILES.items(), ids=list(BAD_FILES))
def test_a_file_that_cannot_be_written_is_refused_and_nothing_is_made(place, name, message):
    before = everything(place)
    with pytest.raises(UserError, match=f"^--json .*{message}"):
        check_output_file("--json", name.format(place))
    assert everything(place) == before


def test_a_good_place_is_returned_and_stays_as_it_was(place):
    before = everything(place)
    for name in ("new", "a/b/c", "full", "ünï code"):
        assert check_output_folder("--out", place / name) == place / name
        assert check_output_file("--json", place / name / "report.json") == place / name / "report.json"
    assert check_output_folder("--out", place / "full", ("*.txt",)) == place / "full"
    assert check_output_file("--json", place / "file") == place / "file"
    assert check_output_folder("--out", str(place / "new")) == Path(place / "new")
    assert everything(place) == before


def test_files_that_would_be_lost_are_named(place):
    with pytest.raises(UserError, match=r"^--out .*full: holds other files \(thesis.txt\)"):
        check_output_folder("--out", place / "full", ("*.json",))
    with pytest.raises(UserError, match=r"^OUT \.: is replaced as a whole"):
        check_output_folder("OUT", ".", ("*",))
    with pytest.raises(UserError, match=r"^OUT .*file: exists already"):
        check_output_file("OUT", place / "file", overwrite=False)


def test_a_mount_point_cannot_be_replaced_as_a_whole_but_takes_files():
    with pytest.raises(UserError, match="/dev/shm: is a mount point"):
        check_output_folder("--out", "/dev/shm", ("*",))
    assert check_output_folder("--out", "/dev/shm") == Path("/dev/shm")


def test_a_disk_without_the_room_that_is_needed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 3 << 20))
    assert check_output_folder("--out", tmp_path / "new", (), need_bytes=3 << 20)
    with pytest.raises(UserError, match=r"not enough room: at least 5\.0 GiB are needed and 3\.0 MiB free"):
        check_output_folder("--run_dir", tmp_path / "new", need_bytes=5 << 30)
    with pytest.raises(UserError, match=r"not enough room: at least 3\.0 MiB"):
        check_output_file("--json", tmp_path / "new" / "x", need_bytes=(3 << 20) + 1)


def test_a_full_disk_is_refused_without_a_stated_need(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="no space left on device"):
        check_output_folder("--out", tmp_path / "new")
    assert everything(tmp_path) == []
