"""The place of a command's results is checked before the work, and the check leaves nothing behind."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tokenloom_common.errors import UserError
from tokenloom_common.files import atomic_folder
from tokenloom_common.outputs import check_output_file, check_output_folder, given_value
from training.data.builders.dataset_folder import previous_build, write_record
from training.places import check_feature_cache


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


@pytest.mark.parametrize("name", ["~", "~/pictures", "~root/a"])
def test_a_home_that_no_shell_replaced_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for check in (check_output_folder, check_output_file):
        with pytest.raises(UserError, match=f"^--out {name}: ~ means home in a shell alone; write /"):
            check("--out", name)
    assert check_output_folder("--out", "./~/pictures") == Path("~/pictures")
    assert check_output_folder("--out", "~nobody-of-this-name") == Path("~nobody-of-this-name")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["dangling", "./dangling", "folder/../dangling"])
def test_the_reason_is_said_once(place, monkeypatch, name):
    monkeypatch.chdir(place)
    (place / "folder").mkdir()
    with pytest.raises(UserError) as raised:
        check_output_folder("--out", name)
    assert str(raised.value).count("--out") == 1


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


def test_a_mount_point_cannot_be_replaced_as_a_whole_but_takes_files(tmp_path):
    (tmp_path / "link").symlink_to("/dev/shm")
    for name in ("/dev/shm", tmp_path / "link"):
        with pytest.raises(UserError, match=f"{name}: is a mount point"):
            check_output_folder("--out", name, ("*",))
    assert check_output_folder("--out", "/dev/shm") == Path("/dev/shm")


def test_a_disk_without_the_room_that_is_needed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 3 << 20))
    assert check_output_folder("--out", tmp_path / "new", (), need_bytes=3 << 20)
    with pytest.raises(UserError, match=r"not enough room: at least 5\.0 GiB are needed and 3\.0 MiB free"):
        check_output_folder("--run_dir", tmp_path / "new", need_bytes=5 << 30)
    with pytest.raises(UserError, match=r"not enough room: at least 3\.0 MiB"):
        check_output_folder("--json", tmp_path / "new" / "x", need_bytes=(3 << 20) + 1)


def test_a_full_disk_is_refused_without_a_stated_need(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="no space left on device"):
        check_output_folder("--out", tmp_path / "new")
    assert everything(tmp_path) == []


# ---- what the commands state without torch

def test_light_tables_agree_with_what_they_stand_for():
    from typing import get_args

    from inference.checkpoints.export import EXPORTERS
    from inference.commands.options import WEIGHTS
    from inference.conversions import EXPORT_ENDINGS, OWN_NAMES
    from inference.decoder.projection import Precision
    from inference.model_folder import GENERATION_NAME, PARTS
    from inference.model_folder import INDEX_NAME as MODEL_INDEX
    from tokenloom_common.pretrained import OWN_FILES
    from training.data.text_features import OWN_FILES as CACHE_FILES
    from training.places import FEATURE_FILES

    assert get_args(Precision) == WEIGHTS
    assert list(EXPORTERS) == list(EXPORT_ENDINGS)
    assert {*OWN_FILES, *PARTS, MODEL_INDEX, GENERATION_NAME} == set(OWN_NAMES)
    assert FEATURE_FILES == CACHE_FILES


@pytest.mark.parametrize(("argv", "value"), [
    (["--out", "a"], "a"), (["--out=a=b"], "a=b"), (["--out", "a", "--json", "b"], "b"), (["--out"], None),
    (["--outer", "a"], None), (["--out="], ""), (["--out", "a", "--help"], None), ([], None)])
def test_the_value_of_an_option_is_found_before_it_is_parsed(argv, value):
    assert given_value(argv, "--out", "--json") == value


# ---- places of the scripts

def test_a_cache_of_text_features_is_checked_only_where_it_will_be_written(place):
    (place / "cache").mkdir()
    check_feature_cache(None)
    check_feature_cache(str(place / "cache"))
    with pytest.raises(UserError, match=r"^--text.feature_cache .*file is a file"):
        check_feature_cache(str(place / "file" / "cache"))
    (place / "cache" / "index.json").write_text("{}")
    (place / "cache" / "more.txt").write_text("")
    check_feature_cache(str(place / "cache"))  # read, and judged by its reader


def test_a_build_that_is_reused_needs_no_place_to_write(tmp_path, monkeypatch):
    arguments = {"size": 8}
    out = tmp_path / "set"
    (out / "data").mkdir(parents=True)
    (out / "data" / "x.parquet").write_text("")
    write_record(out, "shapes", arguments, ["data/x.parquet"], {})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    assert previous_build(out, "shapes", arguments, need_bytes=1)["files"] == ["data/x.parquet"]
    with pytest.raises(UserError, match="not enough room"):
        previous_build(out, "shapes", {"size": 9}, need_bytes=1)


def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old.txt").write_text("")
    (tmp_path / "link").symlink_to("disk")
    with atomic_folder(tmp_path / "link", ("*.txt",)) as aside:
        (aside / "new.txt").write_text("")
    assert everything(tmp_path) == [str(tmp_path / name) for name in ("disk", "disk/new.txt", "link")]
    assert (tmp_path / "link").is_symlink()
