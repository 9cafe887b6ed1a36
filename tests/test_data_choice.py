"""Which format a folder is taken for: what can be meant, said when several can, and links."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.source_files import PNG, as_bytes, own_cache, write_metadata, write_parquet, write_tar  # noqa: F401
from tests.test_data_splits import write_pairs
from tokenloom_common.errors import DataError, UserError
from training.data.sources.locate import find_files
from training.data.sources.open_dataset import open_dataset
from training.data.sources.options import ReadOptions


def write_status(path: Path) -> None:
    """A downloader's table of what it did, without images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"url": ["x"], "key": ["0"], "status": ["success"], "caption": ["x"]}), path)


@pytest.mark.parametrize("data", ["tar", "sidecar", "metadata", "saved"])
def test_table_without_images_is_not_the_data(tmp_path, data):
    write_status(tmp_path / "00000.parquet")
    if data == "tar":
        write_tar(tmp_path / "00000.tar", [("0.png", PNG), ("0.txt", b"a dog")])
    elif data == "sidecar":
        write_pairs(tmp_path, "00000/0")
    elif data == "metadata":
        write_metadata(tmp_path, [{"file_name": "a.png", "text": "a dog"}])
    else:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "part")
    assert find_files(tmp_path, ReadOptions()).format == data


def test_two_formats_are_both_named_with_the_option_that_chooses(tmp_path):
    write_pairs(tmp_path, "a")
    write_tar(tmp_path / "b.tar", [("0.png", PNG), ("0.txt", b"in the tar")])
    with pytest.raises(UserError, match=r"several ways \(1 tar shard; 1 image with .txt files\).*--data.format tar"):
        open_dataset(tmp_path)
    assert open_dataset(tmp_path, format="tar").all_captions() == ["in the tar"]
    assert open_dataset(tmp_path, format="sidecar").all_captions() == ["a"]
    with pytest.raises(UserError, match=r"holds no parquet files, as --data.format parquet.*found 1 tar shard"):
        open_dataset(tmp_path, format="parquet")
    with pytest.raises(UserError, match=r"unknown data.format 'tarr'.*tar"):
        open_dataset(tmp_path, format="tarr")


def test_list_without_captions_leaves_the_caption_files_as_the_data(tmp_path):
    write_pairs(tmp_path, "a")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "width": 3}))
    assert open_dataset(tmp_path).all_captions() == ["a"]


def test_preview_images_beside_parquet_files_are_no_second_format(tmp_path):
    write_parquet(tmp_path / "data" / "train.parquet", [as_bytes(PNG)], ["a dog"])
    (tmp_path / "logo.png").write_bytes(PNG)
    (tmp_path / "README.txt").write_text("what this is")
    assert open_dataset(tmp_path).all_captions() == ["a dog"]


@pytest.mark.parametrize(("ending", "options"), [
    (".caption", {}), (".TXT", {}), (".tags", {"caption_ending": "tags"}), (".wd14.txt", {"caption_ending": ".wd14.txt"}),
    (".png.txt", {}), (".csv", {"caption_ending": ".csv"})])
def test_caption_files_of_other_endings(tmp_path, ending, options):
    (tmp_path / "a b (1).png").write_bytes(PNG)
    (tmp_path / f"a b (1){ending}").write_text("sks dog, best quality")
    assert open_dataset(tmp_path, **options).all_captions() == ["sks dog, best quality"]


def test_unknown_ending_is_named_with_the_option(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "a.tags").write_text("x")
    with pytest.raises(DataError, match=r"pictures without captions \(1 .*if the .tags files beside them hold captions, "
                                        r"give --data.caption_ending .tags"):
        open_dataset(tmp_path)


def test_two_caption_files_of_an_image_are_named(tmp_path):
    write_pairs(tmp_path, "a")
    (tmp_path / "a.caption").write_text("another")
    with pytest.raises(UserError, match=r"two caption files, a.txt and a.caption.*--data.caption_ending .txt or"):
        open_dataset(tmp_path)
    assert open_dataset(tmp_path, caption_ending=".caption").all_captions() == ["another"]


def test_caption_in_a_record_beside_an_image_without_text(tmp_path):
    for stem, text in (("a", ""), ("b", "from the text")):
        (tmp_path / f"{stem}.png").write_bytes(PNG)
        (tmp_path / f"{stem}.txt").write_text(text)
        (tmp_path / f"{stem}.json").write_text(json.dumps({"caption": "from the record", "id": stem}))
    data = open_dataset(tmp_path)
    assert data.all_captions() == ["from the record", "from the text"] and data.metadata(0) == {"id": "a"}


def test_folders_are_classes_on_request_only(tmp_path):
    for name in ("train/n01/a", "train/n02/b", "val/n02/c"):
        write_pairs(tmp_path, name)
        (tmp_path / f"{name}.txt").unlink()
    with pytest.raises(DataError, match=r"if the folders \(n01 and n02, 2 in all\) are classes.*--data.format classes"):
        open_dataset(tmp_path)
    assert open_dataset(tmp_path, format="classes").all_captions() == ["n01", "n02"]
    assert open_dataset(tmp_path, format="classes", split="validation").all_captions() == ["n02"]


@pytest.mark.parametrize(("names", "classes"), [
    (["images/dog/0", "images/cat/1"], ["cat", "dog"]),  # a folder that holds all classes is none
    (["dog/part1/0", "cat/part1/1"], ["cat", "dog"]),
    (["dog/0", "dog/1"], ["dog", "dog"]),
    (["bus/0", "car/1", "cat/2", "dog/3", "train/4"], ["bus", "car", "cat", "dog", "train"])])
def test_class_of_an_image_is_its_outermost_folder_that_tells(tmp_path, names, classes):
    write_pairs(tmp_path, *names)
    for path in tmp_path.rglob("*.txt"):
        path.unlink()
    assert sorted(open_dataset(tmp_path, format="classes").all_captions()) == classes


def test_image_outside_of_every_class_folder_is_counted(tmp_path):
    write_pairs(tmp_path, "dog/0", "cat/1", "2")
    assert open_dataset(tmp_path, format="classes").dropped == {"no class folder": 1}


@pytest.mark.parametrize(("name", "said"), [
    ("a.zip", "unpack a.zip first"), ("captions_train2017.json", "tokenloom data import coco"),
    ("results.csv", "tokenloom data import flickr30k"), ("part-000001.json", "tokenloom data import diffusiondb"),
    ("a.tiff", "convert them to PNG"), ("urls.tsv", "lists URLs, not images: download them first")])
def test_nothing_usable_names_what_is_there_and_the_way_on(tmp_path, name, said):
    (tmp_path / name).write_text("caption\turl\nx\thttps://example.org/1.jpg\n")
    with pytest.raises(DataError, match=rf"holds nothing readable \(1 \.\w+\); .*{said}.*; expected images with"):
        open_dataset(tmp_path)


# Links

def test_link_out_of_the_folder_is_refused_with_the_option_that_follows_it(tmp_path):
    write_pairs(tmp_path / "elsewhere", "a")
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a.png", "a.txt"):
        (data / name).symlink_to(tmp_path / "elsewhere" / name)
    with pytest.raises(DataError, match=r"path outside the folder.*a link to .*elsewhere.*--data.follow_links true"):
        open_dataset(data)
    assert open_dataset(data, follow_links=True)[0].captions == ["a"]


def test_linked_folder_is_followed_on_request_and_once(tmp_path):
    write_pairs(tmp_path / "elsewhere", "g/a")
    data = tmp_path / "data"
    data.mkdir()
    (data / "one").symlink_to(tmp_path / "elsewhere")
    (data / "two").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(data)  # in a circle
    with pytest.raises(DataError, match=r"one is a link to a folder elsewhere, which --data.follow_links true"):
        open_dataset(data)
    assert open_dataset(data, follow_links=True).all_captions() == ["g/a"]


def test_names_in_a_list_never_lead_outside_even_where_links_are_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(PNG)
    folder = write_metadata(tmp_path / "d", [{"file_name": "../secret.png", "text": "x"},
                                             {"file_name": str(tmp_path / "secret.png"), "text": "x"},
                                             {"file_name": "a.png", "text": "a"}])
    data = open_dataset(folder, follow_links=True)
    assert data.all_captions() == ["a"] and data.dropped == {"path outside the folder": 2}


def write_snapshot(root: Path, files: dict[str, bytes]) -> Path:
    """Files as the hub's client leaves them: links to the blobs beside the snapshots."""
    snapshot = root / "datasets--a--b" / "snapshots" / "0123"
    blobs = root / "datasets--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for number, (name, content) in enumerate(files.items()):
        (blobs / f"{number}").write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / f"{number}", (snapshot / name).parent))
    return snapshot


@pytest.mark.parametrize("kind", ["list", "caption files", "folder of the snapshot", "link to the snapshot"])
def test_snapshot_of_the_hub_is_read_through_its_links(tmp_path, kind):
    listed = json.dumps({"file_name": "a.png", "text": "a"}).encode()
    files = {"d/a.png": PNG, "d/metadata.jsonl": listed} if kind == "list" else {"d/a.png": PNG, "d/a.txt": b"a"}
    path = write_snapshot(tmp_path, files)
    if kind == "folder of the snapshot":
        path = path / "d"
    if kind == "link to the snapshot":
        (tmp_path / "mine").symlink_to(path)
        path = tmp_path / "mine"
    data = open_dataset(path)
    assert data[0].captions == ["a"] and not data.dropped


def test_blobs_that_are_a_link_are_not_the_hubs(tmp_path):
    (tmp_path / "secret.png").write_bytes(PNG)
    snapshot = tmp_path / "x" / "snapshots" / "0"
    write_pairs(snapshot, "a")
    (snapshot / "a.png").unlink()
    (snapshot / "a.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "x" / "blobs").symlink_to(tmp_path)
    with pytest.raises(DataError, match="path outside the folder"):
        open_dataset(snapshot)
