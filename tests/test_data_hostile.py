"""Data of careless owners: nothing is read wrongly without a word, and one line says what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.source_files import (
    PNG,
    as_bytes,
    own_cache,  # noqa: F401 (a fixture for all tests here)
    write_metadata,
    write_parquet,
    write_tar,
)
from tokenloom_common.errors import DataError, UserError
from training.data.sources.open_dataset import list_splits, load_source, open_dataset


def write_csv(root, text, name="metadata.csv", codec="utf-8"):
    return write_metadata(root, [text.encode(codec)], name)


def write_images(root, *names, caption=True):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)
        if caption:
            path.with_suffix(".txt").write_text(name)


# Lists

@pytest.mark.parametrize("text, kept, reasons", [
    ("file_name,text\na.png,a dog, sitting\nb.png,a cat", ["a cat"], {"line with more fields than columns": 1}),
    ("text;file_name\na dog;sitting;a.png\na cat;b.png", ["a cat"], {"line with more fields than columns": 1}),
    ('file_name,text\na.png,"a dog\nb.png,a cat', [], {"line with broken quotes": 2}),
    ('file_name,text\na.png,"a dog\nb.png,"a cat"\nb.png,good', ["good"], {"line with broken quotes": 2}),
    ('file_name\ttext\na.png\t"Hello" he said\nb.png\ta 5" cat', ['a 5" cat'], {"line with broken quotes": 1}),
    (f"file_name,text\na.png,{'x' * 200_000}\nb.png,a cat", ["a cat"], {"line too long": 1})])
def test_lines_that_would_be_read_wrongly_are_counted(tmp_path, text, kept, reasons):
    data = load_source(write_csv(tmp_path, text))
    assert data.all_captions() == kept and data.dropped == reasons
    assert any('"a ""big"" dog, sitting"' in hint for hint in data.hints) == ("line too long" not in reasons)


@pytest.mark.parametrize("text", [
    'file_name, text\na.png, "a dog, sitting"', "file_name|text\na.png|a dog, sitting|",
    "\n\nfile_name;text\na.png;a dog, sitting",
    '"sep=;"\nfile_name;text;a, b, c, d\na.png;a dog, sitting', 'file_name,text,,\na.png,"a dog, sitting",,'])
def test_separators_quotes_and_lines_above_the_names(tmp_path, text):
    data = open_dataset(write_csv(tmp_path, text))
    assert data.all_captions() == ["a dog, sitting"] and not data.dropped


@pytest.mark.parametrize("text, said", [
    ("file_name,text,text\na.png,a dog,ein Hund", "two columns are called text"),
    ("", "no line of it can be read"), ("x" * 200_000, "holds no names of columns")])
def test_a_list_that_can_be_meant_in_no_way_is_one_line(tmp_path, text, said):
    with pytest.raises(DataError, match=f"metadata.csv: .*{said}") as caught:
        open_dataset(write_csv(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_names_of_a_list_without_rows_are_known(tmp_path):
    with pytest.raises(DataError, match="holds no usable item"):
        open_dataset(write_csv(tmp_path, "file_name,text"))


def test_thousands_of_columns_are_not_listed(tmp_path):
    names = ",".join(f"c{number}" for number in range(3_000))
    with pytest.raises(UserError, match="c19 and 2,980 more; name it") as caught:
        open_dataset(write_csv(tmp_path, names + "\n" + names))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name, text", [
    ("metadata.csv", "file_name,text\na.png,a dog"), ("metadata.jsonl", '{"file_name": "a.png", "text": "a dog"}')])
@pytest.mark.parametrize("encoding", ["utf-16", "UTF16", "utf_32"])
def test_a_stated_encoding_without_a_mark_is_read(tmp_path, name, text, encoding):
    codec = encoding.lower().replace("_", "-").replace("utf16", "utf-16") + "-le"
    folder = write_csv(tmp_path, text + "\n", name, codec)
    assert open_dataset(folder, encoding=encoding).all_captions() == ["a dog"]


@pytest.mark.parametrize("encoding", ["undefined", "idna", "utf\0"])
def test_codecs_that_are_none_of_texts_are_refused(tmp_path, encoding):
    with pytest.raises(UserError, match="no such encoding"):
        open_dataset(tmp_path, encoding=encoding)


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3_000, "\ud800.png", "circle.png", "a.png/a.png"])
def test_a_name_that_can_be_no_file_costs_its_line(tmp_path, name):
    folder = write_metadata(tmp_path / "d", [{"file_name": name, "text": "x"}, {"file_name": "b.png", "text": "good"}])
    os.symlink("circle.png", folder / "circle.png")
    data = open_dataset(folder)
    assert data.all_captions() == ["good"] and data.dropped.total() == 1
    assert all(len(hint) < 400 for hint in data.hints)


@pytest.mark.parametrize("named, there", [
    ("A.PNG", "a.png"), ("Images/A.png", "images/a.PNG"), ("a", "a.png"), ("images\\A", "images/a.png"),
    ("café.png", unicodedata.normalize("NFD", "café.png"))])
def test_names_in_another_case_form_or_without_ending(tmp_path, named, there):
    write_images(tmp_path, there, caption=False)
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{named},good\n", encoding="utf-8")
    assert open_dataset(tmp_path).all_captions() == ["good"]


def test_a_loose_name_that_two_images_have_is_missing(tmp_path):
    write_images(tmp_path, "a.png", "a.jpg", caption=False)
    (tmp_path / "metadata.csv").write_text("file_name,text\na,x\na.png,good\n")
    data = open_dataset(tmp_path)
    assert data.all_captions() == ["good"] and data.dropped == {"missing file": 1}


@pytest.mark.parametrize("name, content", [("metadata.json", b'[{"a":'), ("notes.csv", "a,b\n1,2\n".encode("utf-16-le")),
                                           ("notes.csv", b"a,a\n1,2\n")])
def test_a_broken_file_beside_the_data_is_no_list(tmp_path, name, content):
    write_images(tmp_path, "a.png")
    (tmp_path / name).write_bytes(content)
    assert open_dataset(tmp_path).all_captions() == ["a.png"]


# Splits

@pytest.mark.parametrize("column", ["split", "Split", " SPLIT "])
def test_split_columns_have_one_rule_in_lists_and_tables(tmp_path, column):
    write_csv(tmp_path / "list", f"file_name,text,{column}\na.png,t,train2017\nb.png,v,Val2017\n")
    assert list_splits(tmp_path / "list") == ["train", "validation"]
    write_parquet(tmp_path / "table" / "x.parquet", [as_bytes(PNG)] * 2, ["t", "v"], **{column: ["Train ", "val2017"]})
    for rows in (0, 1):
        assert open_dataset(tmp_path / "table", streamed_rows=rows).all_captions() == ["t"]


def test_files_without_the_split_column_hold_no_rows_of_it(tmp_path):
    write_parquet(tmp_path / "0.parquet", [as_bytes(PNG)] * 2, ["t", "v"], split=["train", "val"])
    write_parquet(tmp_path / "1.parquet", [as_bytes(PNG)], ["other"])
    for rows in (0, 1):
        data = open_dataset(tmp_path, streamed_rows=rows)
        assert data.all_captions() == ["t"] and data.left_out.total() == 2


@pytest.mark.parametrize("train, held_out", [
    ("DIV2K_train_HR", "DIV2K_valid_HR"), ("coco_train2017", "coco_val2017"), ("my-train", "my-test"),
    ("x/Train_clean", "x/Dev_clean"), ("train", "train/val")])
def test_folders_that_differ_by_the_word_of_a_split_are_splits(tmp_path, train, held_out):
    write_images(tmp_path / "folder", f"{train}/a/0.png", f"{held_out}/a/1.png")
    assert len(list_splits(tmp_path / "folder")) == 2
    assert open_dataset(tmp_path / "folder", split="train").all_captions() == [f"{train}/a/0.png"]
    write_tar(tmp_path / "0.tar", [
        (f"{train}/0.png", PNG), (f"{train}/0.txt", b"t"), (f"{held_out}/1.png", PNG), (f"{held_out}/1.txt", b"v")])
    for rows in (0, 1, 1):
        with pytest.raises(UserError, match="hold different splits"):
            open_dataset(tmp_path / "0.tar", streamed_rows=rows)


def test_classes_with_the_words_of_splits_are_classes(tmp_path):
    write_images(tmp_path, "train station/0.png", "test tube/1.png", caption=False)
    data = open_dataset(tmp_path, format="classes")
    assert data.all_captions() == ["test tube", "train station"]


# Files that are no files, and folders that cannot be read

@pytest.mark.parametrize("name", ["metadata.jsonl", "x.parquet", "x.tar", "saved/state.json"])
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_pipes_and_links_to_nothing_are_named(tmp_path, name, kind):
    write_images(tmp_path, "a.png")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    (path.parent / "x.arrow").write_bytes(b"")
    if kind == "pipe":
        os.mkfifo(path)
    else:
        os.symlink("/nowhere", path)
    for rows in (0, 1):
        with pytest.raises(UserError, match=rf"{name}: (not a file but a .*pipe|a link to nothing)"):
            open_dataset(tmp_path, streamed_rows=rows)


def test_pipes_beside_images_cost_their_items(tmp_path):
    write_images(tmp_path, "a.png", "b.png")
    write_images(tmp_path, "c.png", caption=False)
    (tmp_path / "b.txt").unlink()
    for name in ("b.txt", "c.json", "d.png"):
        os.mkfifo(tmp_path / name)
    data = open_dataset(tmp_path)
    assert data.all_captions() == ["a.png"] and data.dropped == {"missing file": 2, "no caption file": 1}


def test_links_in_circles_end(tmp_path):
    write_images(tmp_path / "d", "a.png")
    write_images(tmp_path, "outside.png")
    (tmp_path / "d" / "b.txt").write_text("b")
    os.symlink("b.png", tmp_path / "d" / "b.png")
    for name, target in (("here", "."), ("above", "..")):
        os.symlink(target, tmp_path / "d" / name)
    for follow in (False, True):
        data = open_dataset(tmp_path / "d", follow_links=follow)
        assert data.all_captions() == ["a.png"] and data.dropped == {"missing file": 1}


@pytest.mark.skipif(os.getuid() != 0, reason="reads as another user")
@pytest.mark.parametrize("name, said", [
    ("x", "permission denied"), ("x.parquet", "cannot be read"), ("x.tar", "cannot be read")])
def test_what_may_not_be_read_is_named(tmp_path, name, said):
    write_images(tmp_path, "a.png")
    path = tmp_path / name
    path.mkdir() if name == "x" else path.write_bytes(b"x")
    path.chmod(0)
    code = ("import os, sys; from pathlib import Path; from training.data.sources.tree import walk_tree\n"
            "os.setuid(65534); walk_tree(Path(sys.argv[1]), False)")
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and len(folder.parts) > 2:
            folder.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert said in done.stderr.lower() and str(path) in done.stderr


@pytest.mark.parametrize("name", [b"\xff.tar", b"d\xff/0.tar", b"\xe9.parquet"])
def test_a_shard_whose_name_is_not_utf8_is_named(tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    path.parent.mkdir(exist_ok=True)
    if name.endswith(b"tar"):
        write_tar(path, [("0.png", PNG), ("0.txt", b"a")])
    else:
        os.rename(write_parquet(tmp_path / "x", [as_bytes(PNG)], ["a"]), path)
    for rows in (0, 1):
        with pytest.raises(UserError, match="a name that is not UTF-8; rename it") as caught:
            open_dataset(tmp_path, streamed_rows=rows)
        str(caught.value).encode()


def test_a_home_of_no_user_is_a_missing_path():
    with pytest.raises(UserError, match="no such file or folder"):
        open_dataset("~nobody-of-this-name/data")


# Folders, tables and tars

def test_a_record_without_a_caption_hides_no_others(tmp_path):
    write_images(tmp_path, "a.png", "b.png", "c.png", caption=False)
    for stem, text in (("a", '{"id": 1}'), ("b", "broken"), ("c", '{"caption": "good"}')):
        (tmp_path / f"{stem}.json").write_text(text)
    data = open_dataset(tmp_path)
    assert data.all_captions() == ["good"] and data.dropped == {"no caption": 2}


def test_every_usual_ending_of_a_jpeg_is_read(tmp_path):
    write_images(tmp_path, "a.jfif", "b.JPE", "c.JFIF")
    assert len(open_dataset(tmp_path)) == 3


def test_images_of_kinds_that_are_not_read_are_counted_among_classes(tmp_path):
    write_images(tmp_path, "cat/a.png", "cat/b.tif", "dog/c.png", "fox/d.AVIF", caption=False)
    data = open_dataset(tmp_path, format="classes")
    assert data.dropped == {".tif file, which is not read": 1, ".avif file, which is not read": 1} and len(data) == 2


def test_several_saved_folders_have_to_be_chosen_from(tmp_path):
    from datasets import Dataset

    for name in ("a", "b"):
        Dataset.from_dict({"image": [PNG], "text": [name]}).save_to_disk(tmp_path / name)
    with pytest.raises(UserError, match=r"several folders of save_to_disk \(a, b\)"):
        open_dataset(tmp_path)
    assert open_dataset(tmp_path / "b").all_captions() == ["b"]


def test_columns_of_the_same_name_are_refused(tmp_path):
    pq.write_table(pa.table([[PNG], ["a"], ["b"]], names=["image", "text", "text"]), tmp_path / "x.parquet")
    for rows in (0, 1):
        with pytest.raises(UserError, match="2 columns are called text"):
            open_dataset(tmp_path, streamed_rows=rows)


def test_what_helps_is_said_of_streamed_tars_too(tmp_path):
    write_tar(tmp_path / "0.tar", [("0.png", PNG), ("0.txt", "café".encode("cp1252"))])
    for rows in (0, 1, 1):
        with pytest.raises(DataError, match=r"not UTF-8.*--data.encoding"):
            open_dataset(tmp_path, streamed_rows=rows)


@pytest.mark.parametrize("options", [{"image_column": ".PNG"}, {"caption_column": "TXT"}, {"caption_ending": ".Txt"}])
def test_extensions_in_tars_are_chosen_in_any_case(tmp_path, options):
    write_tar(tmp_path / "0.tar", [("0.png", PNG), ("0.txt", b"good")])
    assert open_dataset(tmp_path, **options).all_captions() == ["good"]


def test_several_classes_of_an_image_in_a_record_are_captions(tmp_path):
    write_tar(tmp_path / "0.tar", [("0.png", PNG), ("0.json", b'{"labels": [3, true, 5]}')])
    assert open_dataset(tmp_path)[0].captions == ["3", "5"]


@pytest.mark.parametrize("column", ["URL", "image_url", " Url "])
def test_a_table_of_urls_is_to_be_downloaded_first(tmp_path, column):
    pq.write_table(pa.table({column: ["https://example.org/a.jpg"], "TEXT": ["a"]}), tmp_path / "x.parquet")
    for path in (tmp_path, tmp_path / "x.parquet"):
        with pytest.raises(UserError, match="lists URLs, not images: download them first"):
            open_dataset(path)


@pytest.mark.parametrize("names, text", [
    (["train/a.png", "val/a.png"], "file_name,text\na.png,good"), (["images/train/a.png"], "file_name,text\ntrain/a.png,good"),
    (["images/x/a.png", "images/y/a.png"], "file_name,text\nX\\A,good")])
def test_names_without_their_outer_folders_are_found_where_one_image_fits(tmp_path, names, text):
    write_images(tmp_path, *names, caption=False)
    (tmp_path / "train.csv").write_text(text)
    assert open_dataset(tmp_path, format="metadata", split="train").all_captions() == ["good"]


def test_a_list_in_a_folder_of_its_own_names_the_images_beside_it(tmp_path):
    write_images(tmp_path, "images/a.png", caption=False)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "captions.csv").write_text("image,caption\na.png,good\n")
    assert open_dataset(tmp_path).all_captions() == ["good"]


@pytest.mark.parametrize("name, text", [
    ("metadata.jsonl", '[{"file_name": "a.png", "text": "good"},\n {"file_name": "b.png", "text": "good"}]'),
    ("metadata.jsonl", '\ufeff{"file_name": "a.png", "text": "good"}\n\ufeff{"file_name": "b.png", "text": "good"}'),
    ("metadata.csv", "\ufeff\ufefffile_name,text\na.png,good\nb.png,good")])
def test_arrays_and_marks_of_files_put_together(tmp_path, name, text):
    data = open_dataset(write_csv(tmp_path, text, name))
    assert data.all_captions() == ["good", "good"] and not data.dropped


@pytest.mark.parametrize("values", [[["train"], ["val"]], [{"a": 1}, {"a": 2}], [1.5, None]])
def test_a_split_column_of_other_things_names_no_splits(tmp_path, values):
    write_parquet(tmp_path / "x.parquet", [as_bytes(PNG)] * 2, ["a", "b"], split=values)
    for rows in (0, 1):
        assert open_dataset(tmp_path, streamed_rows=rows).all_captions() == ["a", "b"]


def test_chosen_columns_are_found_in_any_case_and_others_are_named(tmp_path):
    folder = write_csv(tmp_path / "d", "Picture File,Tags\na.png,good")
    assert open_dataset(folder, image_column="picture file", caption_column="TAGS").all_captions() == ["good"]
    with pytest.raises(UserError, match=r"no column 'nope' \(columns: Picture File, Tags\)"):
        open_dataset(folder, image_column="nope")
    pq.write_table(pa.table({"Pixels": [PNG], "Tags": ["good"]}), tmp_path / "x.parquet")
    assert open_dataset(tmp_path / "x.parquet", image_column="pixels", caption_column="tags").all_captions() == ["good"]
