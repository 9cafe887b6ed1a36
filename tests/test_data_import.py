"""`tokenloom data import`: every form that published sets come in, bytes and splits as they are."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

from tests.published_sets import (
    coco,
    diffusiondb,
    flickr,
    image_bytes,
    karpathy,
    put,
    results_csv,
    write_images,
)
from tests.source_files import own_cache  # noqa: F401 (a fixture for all tests here)
from training.commands.data import IMPORT_KINDS, main
from training.data.builders import dataset_folder
from training.data.builders.imports.importing import KINDS, import_data
from training.data.sources.open_dataset import list_splits, open_dataset


def captions_of(out: Path, split: str = "train") -> list[list[str]]:
    data = open_dataset(out, split=split)
    return sorted(data.captions(number) for number in range(len(data)))


def test_help_describes_every_kind():
    assert IMPORT_KINDS.keys() == KINDS.keys()


@pytest.mark.parametrize(("year", "images", "annotations"), [
    (2017, "", "annotations"), (2014, "images", "annotations_trainval2014/annotations"), (2017, "raw/deep", "."),
])
def test_coco_keeps_its_splits_and_all_captions(tmp_path, year, images, annotations):
    source = coco(tmp_path / "coco", {"train": 3, "val": 2}, year, images, annotations)
    report = import_data("coco", source, tmp_path / "out")
    assert report["pairs"] == {"train": 3, "validation": 2} and report["missing"] == 0
    assert captions_of(tmp_path / "out", "validation") == [["val 0 view 0", "val 0 view 1"],
                                                           ["val 1 view 0", "val 1 view 1"]]
    assert open_dataset(tmp_path / "out").metadata(1)["license"] == "CC BY"


def test_images_of_equal_names_are_told_apart_by_the_folder_of_their_split(tmp_path):
    for split in ("train", "val"):
        put(tmp_path / f"coco/{split}2017/0.jpg", image_bytes(len(split)))
        put(tmp_path / f"coco/annotations/captions_{split}2017.json", json.dumps(
            {"images": [{"id": 0, "file_name": "0.jpg"}], "annotations": [{"image_id": 0, "caption": split}]}))
    import_data("coco", tmp_path / "coco", tmp_path / "out")
    for split, name in (("train", "train"), ("validation", "val")):
        (row,) = pq.read_table(tmp_path / f"out/data/{split}-00000-of-00001.parquet").to_pylist()
        assert row["captions"] == [name] and row["image"]["bytes"] == image_bytes(len(name))


def test_captions_never_get_the_image_of_another_split(tmp_path):
    source = coco(tmp_path / "coco", {"train": 2, "val": 2})
    for path in (source / "val2017").iterdir():  # not downloaded; train has images of these names
        path.rename(source / "train2017" / path.name)
    report = import_data("coco", source, tmp_path / "out")
    assert report["pairs"] == {"train": 2} and report["missing"] == 2


@pytest.mark.parametrize("folder", [None, "val2014"])
def test_karpathy_splits_are_kept_and_restval_is_trained_on(tmp_path, folder):
    source = karpathy(tmp_path / "s", "dataset_coco.json", ["train", "restval", "val", "test"], folder)
    report = import_data("coco", source, tmp_path / "out")
    assert report["pairs"] == {"train": 2, "validation": 1, "test": 1}
    assert captions_of(tmp_path / "out", "test") == [["test 3", "another"]]


FLICKR_FORMS = {
    "results.csv": results_csv(),
    "results_20130124.token": "".join(f'{n}.jpg#{k}\tview {k} of {n} .\n' for n in range(3) for k in range(2)),
    "captions.txt": "image,caption\n" + "".join(f'{n}.jpg,view {k} of {n} .\n' for n in range(3) for k in range(2)),
    "flickr_annotations_30k.csv": "raw,split,filename\n" + "".join(
        f'"[""view 0 of {n} ."", ""view 1 of {n} .""]",train,{n}.jpg\n' for n in range(3)),
}


@pytest.mark.parametrize("name", FLICKR_FORMS)
def test_every_form_of_flickr30k_gives_the_same_captions(tmp_path, name):
    source = flickr(tmp_path / "s", name, FLICKR_FORMS[name])
    report = import_data("flickr30k", source, tmp_path / "out")
    assert report["pairs"] == {"train": 3} and report["dropped"] == {}
    assert captions_of(tmp_path / "out") == [[f"view 0 of {n} .", f"view 1 of {n} ."] for n in range(3)]


def test_quoted_commas_bars_and_tabs_stay_in_captions(tmp_path):
    rows = {"captions.csv": 'image,caption\n0.jpg,"a, b | c"\n', "captions.tsv": '0.jpg\ta, b | "c"\n'}
    for name, text in rows.items():
        source = flickr(tmp_path / name / "s", name, text, images=1)
        import_data("table", source, tmp_path / name / "out")
    assert captions_of(tmp_path / "captions.csv/out") == [["a, b | c"]]
    assert captions_of(tmp_path / "captions.tsv/out") == [['a, b | "c"']]


def test_lists_of_names_hold_out_what_they_hold_out(tmp_path):
    source = flickr(tmp_path / "s", "Flickr8k.token.txt",
                    "".join(f"{n}.jpg#0\tcaption {n}\n" for n in range(4)), 4, "Flicker8k_Dataset")
    for name, line in (("train", "0.jpg"), ("dev", "1.jpg"), ("test", "2.jpg")):
        put(source / f"Flickr_8k.{name}Images.txt", line + "\n")
    report = import_data("flickr8k", source, tmp_path / "out")
    assert report["pairs"] == {"train": 1, "validation": 1, "test": 1}
    assert report["dropped"]["image in no list of a split"] == 1
    assert captions_of(tmp_path / "out", "test") == [["caption 2"]]


def test_the_same_folder_unpacked_twice_does_no_harm(tmp_path):
    source = tmp_path / "s"
    for folder in (source, source / "flickr30k_images"):
        flickr(folder, "results.csv", results_csv())
    assert import_data("flickr30k", source, tmp_path / "out")["pairs"] == {"train": 3}
    assert captions_of(tmp_path / "out")[0] == ["view 0 of 0 .", "view 1 of 0 ."]


def test_links_to_elsewhere_are_followed_on_request(tmp_path):
    source = coco(tmp_path / "coco", {"train": 2, "val": 1})
    (source / "train2017").rename(tmp_path / "disk")
    (source / "train2017").symlink_to(tmp_path / "disk")
    assert import_data("coco", source, tmp_path / "a")["missing"] == 2
    assert import_data("coco", source, tmp_path / "b", follow_links=True)["pairs"] == {"train": 2, "validation": 1}


@pytest.mark.parametrize("there", [
    {"with_metadata": False}, {"with_json": False}, {}, {"folder": "."},
    {"folder": "diffusiondb-large-part-1", "ending": ".webp"}, {"with_json": False, "ending": ".webp"},
])
def test_diffusiondb_with_either_source_of_prompts(tmp_path, there):
    source = diffusiondb(tmp_path / "s", **there)
    assert import_data("diffusiondb", source, tmp_path / "out")["pairs"] == {"train": 4}
    data = open_dataset(tmp_path / "out")
    assert data.captions(0) == [f"prompt of {Path(data.key(0)).name}"]
    assert data.metadata(0)["seed"] == 7 and data.metadata(0)["cfg"] == 7.5


def test_a_part_without_its_json_is_found_in_the_table(tmp_path):
    source = diffusiondb(tmp_path / "s")
    (source / "images/part-000002/part-000002.json").unlink()
    put(source / "images/part-000001/extra.png", image_bytes(9, "PNG"))
    report = import_data("diffusiondb", source, tmp_path / "out")
    assert report["pairs"] == {"train": 4} and report["dropped"] == {"image without a caption": 1}


@pytest.mark.parametrize("with_json", [True, False])
def test_parts_may_lie_apart_from_their_prompts(tmp_path, with_json):
    source = diffusiondb(tmp_path / "s", with_json=with_json)
    for part in (source / "images").iterdir():
        for image in part.glob("*.png"):
            put(tmp_path / "disk" / part.name / image.name, image.read_bytes())
            image.unlink()
    report = import_data("diffusiondb", source, tmp_path / "out", images=tmp_path / "disk")
    assert report["pairs"] == {"train": 4} and open_dataset(tmp_path / "out").key(0).startswith("part-000001/")


def test_names_of_splits_cannot_lead_out_of_the_folder(tmp_path):
    source = karpathy(tmp_path / "s", "dataset_flickr30k.json", ["../../mini val", "train"])
    report = import_data("flickr30k", source, tmp_path / "a" / "out")
    assert report["pairs"] == {"_mini_val": 1, "train": 1}
    assert list_splits(tmp_path / "a" / "out") == ["_mini_val", "train"]


def test_bytes_are_copied_and_datasets_reads_the_shards(tmp_path):
    source = coco(tmp_path / "coco", {"train": 2, "val": 1})
    import_data("coco", source, tmp_path / "out")
    row = pq.read_table(tmp_path / "out/data/train-00000-of-00001.parquet").to_pylist()[1]
    assert row["image"]["bytes"] == (source / "train2017/train_000000000001.jpg").read_bytes()
    assert row["key"] == "train2017/train_000000000001.jpg"
    loaded = datasets.load_dataset(str(tmp_path / "out"))
    assert {name: len(rows) for name, rows in loaded.items()} == {"train": 2, "validation": 1}
    assert loaded["train"][0]["image"].size == (32, 32)


def test_large_sets_become_several_shards_of_small_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_folder, "GROUP_ROWS", 3)
    monkeypatch.setattr(dataset_folder, "SHARD_BYTES", 1)
    flickr(tmp_path / "s", "captions.tsv", "".join(f"{n}.jpg\tcaption {n}\n" for n in range(8)), 8)
    report = import_data("table", tmp_path / "s", tmp_path / "out")
    assert report["files"] == [f"data/train-{n:05d}-of-00003.parquet" for n in range(3)]
    assert pq.read_metadata(tmp_path / "out" / report["files"][0]).num_row_groups == 1
    assert len(open_dataset(tmp_path / "out", streamed_rows=4)) == 8
    assert datasets.load_dataset(str(tmp_path / "out"), split="train").num_rows == 8


def test_memory_holds_one_row_group_of_large_images(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_folder, "GROUP_BYTES", 1)
    flickr(tmp_path / "s", "captions.tsv", "".join(f"{n}.jpg\tcaption {n}\n" for n in range(3)))
    import_data("table", tmp_path / "s", tmp_path / "out")
    assert pq.read_metadata(tmp_path / "out/data/train-00000-of-00001.parquet").num_row_groups == 3


def test_an_equal_import_is_reused_and_another_content_is_not(tmp_path):
    source = coco(tmp_path / "coco", {"train": 2})
    annotations = source / "annotations/captions_train2017.json"
    assert not import_data("coco", source, tmp_path / "out")["reused"]
    assert import_data("coco", source, tmp_path / "out")["reused"]
    annotations.write_text(annotations.read_text().replace("view 0", "view X"))
    assert not import_data("coco", source, tmp_path / "out")["reused"]
    image = source / "train2017/train_000000000000.jpg"
    image.write_bytes(image_bytes(5))
    os.utime(image, (1, 1))
    assert not import_data("coco", source, tmp_path / "out")["reused"]
    assert "train 0 view X" in captions_of(tmp_path / "out")[0]


def test_what_is_left_out_is_counted_and_named(tmp_path, capsys):
    source = flickr(tmp_path / "s s", "captions.tsv", "0.jpg\tgood\n1.jpg\t \n2.jpg\tx\nbroken\ngone.jpg\tx\n", 4)
    (source / "flickr30k_images/2.jpg").write_bytes(b"")
    assert main(["import", "table", str(source), "--out", str(tmp_path / "o o")]) == 0
    shown = capsys.readouterr()
    assert f"warning: 1 of 2 pictures are not below {source} (such as gone.jpg)" in shown.err
    built, captions, following = shown.out.splitlines()
    assert captions == f"captions of {source / 'captions.tsv'}"
    for part in ("1 train", "1 no caption", "1 empty or huge file", "1 broken line", "1 image without a caption"):
        assert part in built
    assert following == f"next: tokenloom data check '{tmp_path / 'o o'}'"


@pytest.mark.parametrize(("encoding", "given"), [("utf-16", None), ("utf-8-sig", None), ("cp1252", "cp1252")])
def test_annotations_in_other_encodings(tmp_path, encoding, given):
    write_images(tmp_path / "s/pics", ["ü.jpg"])
    (tmp_path / "s/captions.csv").write_bytes("image;caption\r\nü.jpg;un café\r\n".encode(encoding))
    import_data("table", tmp_path / "s", tmp_path / "out", encoding=given)
    assert captions_of(tmp_path / "out") == [["un café"]]


def test_named_annotations_and_images_may_lie_anywhere(tmp_path):
    source = coco(tmp_path / "coco", {"train": 2}, annotations="elsewhere")
    moved = tmp_path / "notes.json"
    (source / "elsewhere/captions_train2017.json").rename(moved)
    report = import_data("coco", tmp_path / "coco/elsewhere", tmp_path / "out", annotations=[moved], images=source)
    assert report["pairs"] == {"train": 2} and list_splits(tmp_path / "out") == ["train"]
