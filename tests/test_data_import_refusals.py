"""`tokenloom data import` refuses in one line, before it writes anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.published_sets import coco, diffusiondb, flickr, image_bytes, karpathy, put, results_csv
from tests.source_files import own_cache  # noqa: F401 (a fixture for all tests here)
from tokenloom_common.errors import run_command
from training.commands.data import main


def refusal(capsys, code: int, *argv: str | Path) -> str:
    """The one line of an import that ends with `code`."""
    assert run_command(main, ["import", *map(str, argv)], "tokenloom data") == code
    lines = [line for line in capsys.readouterr().err.splitlines() if "image/s" not in line]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def out(tmp_path):
    """A folder that no refused import makes."""
    path = tmp_path / "out"
    yield path
    assert not path.exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("asked", ["coco", "flickr8k", "diffusiondb", "table"])
def test_another_kind_is_recognized(tmp_path, out, capsys, asked):
    source = flickr(tmp_path / "my set", "results.csv", results_csv())
    line = refusal(capsys, 2, asked, source, "--out", out)
    assert f"this looks like flickr30k ({source / 'results.csv'})" in line
    assert f"tokenloom data import flickr30k '{source}' --out DIR" in line


def test_recognized_kinds_of_other_sets(tmp_path, out, capsys):
    assert "looks like coco" in refusal(capsys, 2, "flickr30k", coco(tmp_path / "c", {"train": 1}), "--out", out)
    assert "looks like diffusiondb" in refusal(capsys, 2, "coco", diffusiondb(tmp_path / "d"), "--out", out)


def test_a_table_of_other_things_is_not_taken_for_captions(tmp_path, out, capsys):
    put(tmp_path / "s/results.csv", "epoch,loss\n1,2\n")
    assert "holds none of captions_*.json" in refusal(capsys, 2, "coco", tmp_path / "s", "--out", out)


def test_kind_or_folder_left_out_or_misspelled(tmp_path, out, capsys):
    source = coco(tmp_path / "c", {"train": 1})
    assert "data import KIND SRC --out DIR` (coco, flickr30k" in refusal(capsys, 2, source, "--out", out)
    assert "did you mean 'coco'" in refusal(capsys, 2, "cocoo", source, "--out", out)
    assert "no such folder" in refusal(capsys, 2, "coco", tmp_path / "gone", "--out", out)
    assert "unpack it" in refusal(capsys, 2, "coco", put(tmp_path / "coco.zip", "x"), "--out", out)
    assert "--annotations" in refusal(capsys, 2, "coco", source, "--out", out, "--annotations", tmp_path / "no.json")


def test_archives_are_to_be_unpacked(tmp_path, out, capsys):
    put(tmp_path / "s/annotations_trainval2017.zip", "x")
    line = refusal(capsys, 2, "coco", tmp_path / "s", "--out", out)
    assert f"unpack {tmp_path / 's/annotations_trainval2017.zip'} and the others first" in line


@pytest.mark.parametrize(("content", "where"), [
    (b'{"images": [\n{"id": 1, ]', "line 2, column 11"), (b"", "line 1, column 1"), (b"<html>", "line 1, column 1"),
    (b"[" * 100_000, "not JSON"), (b"\xff\x00\xfe", "not UTF-8"), (b"[1, 2]", "holds no captions"),
])
def test_broken_json_names_its_file_and_place(tmp_path, out, capsys, content, where):
    source = coco(tmp_path / "c", {"train": 1})
    path = put(source / "annotations/captions_train2017.json", content)
    line = refusal(capsys, 4, "coco", source, "--out", out)
    assert f"error: {path}" in line and where.lower() in line.lower()


def test_annotations_of_boxes_are_no_captions(tmp_path, out, capsys):
    source = coco(tmp_path / "c", {"train": 1})
    boxes = put(source / "annotations/instances_train2017.json", json.dumps(
        {"images": [{"id": 0, "file_name": "0.jpg"}], "annotations": [{"image_id": 0, "bbox": [0, 0, 1, 1]}]}))
    line = refusal(capsys, 4, "coco", source, "--out", out, "--annotations", boxes)
    assert f"{boxes}: holds no captions" in line and "captions_train2017.json" in line


def test_images_that_are_nowhere_end_with_the_place_that_was_looked_at(tmp_path, out, capsys):
    source = coco(tmp_path / "c", {"train": 2})
    (tmp_path / "empty").mkdir()
    line = refusal(capsys, 4, "coco", source, "--out", out, "--images", tmp_path / "empty")
    assert "none of the 2 images that captions_train2017.json names is there" in line
    assert f"train_000000000000.jpg, looked for below {tmp_path / 'empty'}" in line and "--images" in line


def test_a_link_that_would_have_to_be_followed_is_named(tmp_path, out, capsys):
    source = coco(tmp_path / "c", {"train": 1})
    (source / "train2017").rename(tmp_path / "disk")
    (source / "train2017").symlink_to(tmp_path / "disk")
    assert f"{source / 'train2017'} is a link, which --follow-links follows" in refusal(
        capsys, 4, "coco", source, "--out", out)


def test_a_broken_table_of_prompts_is_named(tmp_path, out, capsys):
    source = diffusiondb(tmp_path / "s", with_json=False)
    broken = put(source / "metadata.parquet", "PAR1 cut off")
    assert f"{broken}: cannot be read" in refusal(capsys, 4, "diffusiondb", source, "--out", out)


def test_two_sorts_of_annotations_or_years_have_to_be_chosen_from(tmp_path, out, capsys):
    both = coco(tmp_path / "a", {"train": 1})
    karpathy(both, "dataset_coco.json", ["train"])
    assert "split the images differently; name one with --annotations" in refusal(capsys, 2, "coco", both, "--out", out)
    years = coco(coco(tmp_path / "b", {"train": 1}, 2014), {"val": 1}, 2017)
    assert "2014 and 2017, whose splits share images" in refusal(capsys, 2, "coco", years, "--out", out)


def test_an_image_in_two_splits_is_refused(tmp_path, out, capsys):
    source = karpathy(tmp_path / "s", "dataset_flickr30k.json", ["train", "test"])
    path = source / "dataset_flickr30k.json"
    path.write_text(path.read_text().replace("1.jpg", "0.jpg"))
    assert "is in the splits train and test" in refusal(capsys, 4, "flickr30k", source, "--out", out)
    text = "image,caption,split\n0.jpg,a,train\n0.jpg,b,val\n"
    table = flickr(tmp_path / "t", "captions.csv", text)
    assert "is in the splits train and val" in refusal(capsys, 4, "table", table, "--out", out)


def test_different_images_of_one_name_are_refused(tmp_path, out, capsys):
    source = flickr(tmp_path / "s", "captions.tsv", "0.jpg\tx\n")
    put(source / "other/0.jpg", image_bytes(77))
    line = refusal(capsys, 4, "table", source, "--out", out)
    assert "flickr30k_images/0.jpg and other/0.jpg differ" in line and "--images" in line


def test_links_out_of_the_folder_and_names_that_lead_out_are_not_read(tmp_path, out, capsys):
    secret = put(tmp_path / "secret.jpg", image_bytes(1))
    source = diffusiondb(tmp_path / "s", parts=1, with_metadata=False)
    part = source / "images/part-000001"
    put(part / "part-000001.json", json.dumps({"../../../secret.jpg": {"p": "x"}, str(secret): {"p": "y"}}))
    assert "no image with a caption (2 broken annotation" in refusal(capsys, 4, "diffusiondb", source, "--out", out)
    linked = flickr(tmp_path / "t", "captions.tsv", "link.jpg\tx\n")
    (linked / "link.jpg").symlink_to(secret)
    assert "none of the 1 images" in refusal(capsys, 4, "table", linked, "--out", out)


def test_a_place_without_room_is_refused(tmp_path, out, capsys, monkeypatch):
    source = coco(tmp_path / "c", {"train": 3})
    usage = type("Usage", (), {"free": 1_000})
    monkeypatch.setattr("tokenloom_common.outputs.shutil.disk_usage", lambda place: usage)
    line = refusal(capsys, 2, "coco", source, "--out", out)
    assert "--out" in line and "not enough room" in line


def test_folders_of_others_are_left_alone(tmp_path, capsys):
    source = coco(tmp_path / "c", {"train": 1})
    mine = put(tmp_path / "mine/notes.txt", "x").parent
    assert "holds other files" in refusal(capsys, 2, "coco", source, "--out", mine)
    assert "holds other files" in refusal(capsys, 2, "coco", source, "--out", source)
    assert main(["shapes", "--out", str(tmp_path / "shapes"), "--num_scenes", "20", "--size", "16"]) == 0
    capsys.readouterr()
    line = refusal(capsys, 2, "coco", source, "--out", tmp_path / "shapes")
    assert "not an earlier build of `tokenloom data import coco`" in line
    assert (mine / "notes.txt").exists() and (tmp_path / "shapes/build.json").exists()


def test_a_table_that_cannot_be_read_as_one_is_refused_with_its_name(tmp_path, out, capsys):
    source = flickr(tmp_path / "s", "captions.csv", 'image,caption\n0.jpg,"' + "never closed\n" * 20_000)
    line = refusal(capsys, 4, "table", source, "--out", out)
    assert f"{source / 'captions.csv'}: not a table that can be read" in line
    other = put(tmp_path / "other.csv", "epoch,loss\n1,2\n")
    line = refusal(capsys, 4, "table", source, "--out", out, "--annotations", other)
    assert f"{other}: its first line names no columns of images and captions" in line
