"""Splits: what is held out by a folder, a file name, a list or its column never ends in training."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from tests.source_files import PNG, as_bytes, own_cache, write_metadata, write_parquet, write_tar  # noqa: F401
from tokenloom_common.errors import UserError
from training.data.sources.open_dataset import list_splits, open_dataset
from training.data.sources.splits import SplitFolders, folder_split


def write_pairs(root: Path, *names: str) -> Path:
    """Images at root/NAME.png with NAME as caption."""
    for name in names:
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)
        path.with_suffix(".txt").write_text(name)
    return root


def captions_by_split(root: Path, **options) -> dict[str, list[str]]:
    return {split: sorted(open_dataset(root, split=split, **options).all_captions())
            for split in list_splits(root, **options)}


@pytest.mark.parametrize(("names", "splits"), [
    (["train/g/0", "val/g/1"], {"train": ["train/g/0"], "validation": ["val/g/1"]}),
    (["train/a/b/c/0", "test/1"], {"train": ["train/a/b/c/0"], "test": ["test/1"]}),
    (["train/0", "val/g/h/1"], {"train": ["train/0"], "validation": ["val/g/h/1"]}),
    (["0", "val/1"], {"train": ["0"], "validation": ["val/1"]}),  # images of its own beside a held-out folder
    (["images/train2017/0", "images/val2017/1"],
     {"train": ["images/train2017/0"], "validation": ["images/val2017/1"]}),
    (["part1/train/0", "part2/train/1", "part2/dev/2"],
     {"train": ["part1/train/0", "part2/train/1"], "validation": ["part2/dev/2"]}),
    (["cats/0", "test_images/1"], {"train": ["cats/0"], "test": ["test_images/1"]}),
    (["train/0", "unseen_style/a/1"], {"train": ["train/0"], "unseen_style": ["unseen_style/a/1"]}),
    (["test/train/0", "train/1"], {"test": ["test/train/0"], "train": ["train/1"]}),
])
def test_folder_with_the_name_of_a_split_is_that_split_however_deep(tmp_path, names, splits):
    assert captions_by_split(write_pairs(tmp_path, *names)) == splits


def test_train_among_many_folders_is_a_class_of_trains():
    folders = SplitFolders(PurePosixPath(name) for name in ("bus", "car", "cat", "dog", "train"))
    assert [folders.split(PurePosixPath(name)) for name in ("bus", "train")] == [None, None]


def test_words_within_other_names_are_no_splits():
    names = ["test tube", "trainee", "valid_until", "developers", "contest", "train station"]
    assert [folder_split(name) for name in names] == [None] * len(names)
    assert [folder_split(name) for name in ("Val", "train-images", "data_test", "validation set 2")] == [
        "validation", "train", "test", "validation"]


@pytest.mark.parametrize(("names", "splits"), [
    (["train/part-00000-of-00002", "test/part-00000-of-00002"], ["test", "train"]),
    (["set-train-0000", "set-validation-0000"], ["train", "validation"]),
    (["a/b/0", "test/b/0"], ["test", "train"]),
    (["train/0", "train/val_0"], ["train", "validation"]),
])
@pytest.mark.parametrize("ending", ["tar", "parquet"])
def test_splits_of_shards_at_any_depth(tmp_path, names, splits, ending):
    for name in names:
        path = tmp_path / f"{name}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if ending == "tar":
            write_tar(path, [("0.png", PNG), ("0.txt", name.encode())])
        else:
            write_parquet(path, [as_bytes(PNG)], [name])
    found = captions_by_split(tmp_path)
    assert sorted(found) == splits
    held_out = [name for split, captions in found.items() if split != "train" for name in captions]
    assert all("val" in name or "test" in name for name in held_out) and len(held_out) == 1


def test_braces_keep_the_splits_of_the_names(tmp_path):
    for name in ("train-0", "val-0"):
        write_tar(tmp_path / f"{name}.tar", [("0.png", PNG), ("0.txt", name.encode())])
    assert captions_by_split(f"{tmp_path}/{{train,val}}-0.tar") == {"train": ["train-0"], "validation": ["val-0"]}


def test_list_above_split_folders_follows_its_images(tmp_path):
    write_pairs(tmp_path, "train/0", "val/1")
    for path in tmp_path.rglob("*.txt"):
        path.unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text\ntrain/0.png,a\nval/1.png,b\n")
    assert captions_by_split(tmp_path) == {"train": ["a"], "validation": ["b"]}


def test_split_column_of_a_list_is_kept_apart(tmp_path):
    write_metadata(tmp_path, [{"file_name": "a.png", "text": "a", "split": "train"},
                              {"file_name": "b.png", "text": "b", "split": "Val"}])
    assert captions_by_split(tmp_path) == {"train": ["a"], "validation": ["b"]}


def test_lists_named_after_splits(tmp_path):
    folder = write_metadata(tmp_path, [{"image": "a.png", "caption": "a"}], "captions_train.jsonl")
    write_metadata(folder, [{"image": "b.png", "caption": "b"}], "captions_val2017.jsonl")
    assert captions_by_split(tmp_path) == {"train": ["a"], "validation": ["b"]}


def test_two_lists_of_one_folder_are_named_instead_of_one_being_taken(tmp_path):
    folder = write_metadata(tmp_path, [{"file_name": "a.png", "text": "a"}])
    write_metadata(folder, ["file_name,text", "b.png,b"], "metadata.csv")
    with pytest.raises(UserError, match=r"metadata.csv and metadata.jsonl are lists of the same images.*--data.path"):
        open_dataset(folder)
    assert open_dataset(folder / "metadata.csv").all_captions() == ["b"]
