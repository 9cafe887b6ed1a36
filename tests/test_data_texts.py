"""Encodings of captions, and lists of images with other columns, separators and line ends."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.source_files import PNG, own_cache, write_metadata  # noqa: F401
from tokenloom_common.errors import DataError, UserError
from training.data.sources.open_dataset import open_dataset

RUSSIAN = "красный квадрат"


@pytest.mark.parametrize(("codec", "mark", "encoding"), [
    ("utf-8", "", None), ("utf-8-sig", "", None), ("utf-16", "", None), ("utf-16-be", "\ufeff", None),
    ("utf-32", "", None), ("cp1251", "", "cp1251"), ("koi8-r", "", "koi8-r"), ("utf-16-le", "", "utf-16-le"),
    ("utf-16", "", "cp1251")])  # a byte order mark counts more than the option
@pytest.mark.parametrize("kind", ["caption file", "csv", "jsonl", "json"])
def test_captions_in_any_stated_encoding(tmp_path, kind, codec, mark, encoding):
    (tmp_path / "a.png").write_bytes(PNG)
    if kind == "caption file":
        name, text = "a.txt", f"{RUSSIAN}\r\nдругой\r\n"
    elif kind == "csv":
        name, text = "metadata.csv", f'file_name,text\r\na.png,{RUSSIAN}\r\n'
    else:
        line = json.dumps({"file_name": "a.png", "text": RUSSIAN}, ensure_ascii=False)
        name, text = (f"metadata.{kind}", f"{line}\r\n") if kind == "jsonl" else ("metadata.json", f"[\n{line}\n]")
    (tmp_path / name).write_bytes((mark + text).encode(codec))
    data = open_dataset(tmp_path, encoding=encoding)
    assert data.captions(0)[0] == RUSSIAN and sum(data.encodings.values()) == 1


@pytest.mark.parametrize("raw", [RUSSIAN.encode("utf-16-le"), "a red square".encode("utf-16-be"), RUSSIAN.encode("cp1251"),
                                 "un café".encode("latin-1"), "図".encode("shift-jis"), b"\xff\xfea"])
def test_text_that_is_not_utf8_is_dropped_and_said_with_the_option(tmp_path, raw):
    for stem in "ab":
        (tmp_path / f"{stem}.png").write_bytes(PNG)
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "b.txt").write_bytes(b"good")
    data = open_dataset(tmp_path)
    assert data.all_captions() == ["good"]
    assert [item.key for item in data.bad_items] == ["a.png"] and "caption " in data.bad_items[0].reason
    (tmp_path / "b.txt").unlink()
    with pytest.raises(DataError, match=r"no usable item.*a.txt is .*--data.encoding"):
        open_dataset(tmp_path)


def test_lines_of_a_list_that_are_not_utf8_are_dropped_one_by_one(tmp_path):
    folder = write_metadata(tmp_path, ["file_name;text", "a.png;un café".encode("cp1252"), "b.png;good"], "metadata.csv")
    data = open_dataset(folder)
    assert data.all_captions() == ["good"] and data.dropped == {"line not UTF-8": 1}
    assert open_dataset(folder, encoding="cp1252").all_captions() == ["un café", "good"]


def test_list_in_utf16_without_a_mark_is_refused_with_the_option(tmp_path):
    folder = write_metadata(tmp_path, ["file_name,text\na.png,a dog\n".encode("utf-16-le")], "metadata.csv")
    with pytest.raises(DataError, match=r"metadata.csv: UTF-16 without a byte order mark.*--data.encoding"):
        open_dataset(folder)


@pytest.mark.parametrize("encoding", ["cp9999", "hex", "rot13"])
def test_unknown_encoding_is_refused(tmp_path, encoding):
    with pytest.raises(UserError, match=rf"data.encoding {encoding}: no such encoding"):
        open_dataset(tmp_path, encoding=encoding)


@pytest.mark.parametrize("lines", [
    ["file_name;text", "a.png;a dog, sitting"], ["image\tcaption", "a.png\ta dog, sitting"],
    ["image_name| comment_number| caption", "a.png| 0| a dog, sitting"], [" File_Name , TEXT", 'a.png,"a dog, sitting"'],
    ["sep=;", "file_name;text", "a.png;a dog, sitting"],
    ["prompt,path", '"a dog, sitting",a.png'], ["filename,label", 'a.png,"a dog, sitting"']])
def test_separators_and_usual_columns_of_a_list(tmp_path, lines):
    for name in ("metadata.csv", "results.tsv"):
        folder = write_metadata(tmp_path / name, lines, name)
        assert open_dataset(folder).all_captions() == ["a dog, sitting"]


@pytest.mark.parametrize("text", ['[{"image": "a.png", "caption": "a"}]', '{"image": "a.png", "caption": "a"}\n'])
def test_list_in_one_json_document_given_by_its_path(tmp_path, text):
    path = write_metadata(tmp_path, [text], "annotations.json") / "annotations.json"
    assert open_dataset(path).all_captions() == ["a"]
    path.write_text('{"images": [], "annotations": [')
    with pytest.raises(UserError, match=r"annotations.json: one document about all images.*data import coco"):
        open_dataset(path)
    path.write_text('[{"image": ')
    with pytest.raises(DataError, match=r"annotations.json: not JSON"):
        open_dataset(path)


def test_columns_of_a_list_can_be_named(tmp_path):
    folder = write_metadata(tmp_path, [{"photo": "a.png", "says": "a dog", "text": "other"}])
    with pytest.raises(UserError, match=r"no column with the names of the images.*columns: photo, says, text; name it "
                                        r"with --data.image_column"):
        open_dataset(folder)
    data = open_dataset(folder, image_column="photo", caption_column="says")
    assert data.all_captions() == ["a dog"] and data.metadata(0) == {"text": "other"}


def test_list_without_a_caption_column_says_which_columns_there_are(tmp_path):
    folder = write_metadata(tmp_path, [{"file_name": "a.png", "says": "a dog"}])
    with pytest.raises(DataError, match=r"no column with captions; other columns: says; name it with --data.caption_column"):
        open_dataset(folder)


@pytest.mark.parametrize("name", ["images\\a.png", "images/a.png", "a.png", ".\\images\\a.png"])
def test_names_written_on_windows_or_without_their_folder(tmp_path, name):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(PNG)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a"}))
    assert len(open_dataset(tmp_path)) == 1


def test_file_whose_name_has_a_backslash_is_found_as_it_is(tmp_path):
    (tmp_path / "images\\a.png").write_bytes(PNG)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "images\\a.png", "text": "a"}))
    assert len(open_dataset(tmp_path)) == 1


def test_names_as_seen_from_the_root_of_the_data_and_the_path_that_was_looked_for(tmp_path):
    folder = write_metadata(tmp_path / "train", [{"file_name": "train/a.png", "text": "a"},
                                                 {"file_name": "train/gone.png", "text": "b"}])
    assert open_dataset(tmp_path).all_captions() == ["a"]
    with pytest.raises(DataError, match=rf"missing file.*looked for {folder}/train/a.png"):
        open_dataset(folder)


def test_name_without_folder_that_two_images_have_is_missing(tmp_path):
    for folder in "xy":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(PNG)
    (tmp_path / "x" / "b.png").write_bytes(PNG)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a\nb.png,b\n")
    data = open_dataset(tmp_path)
    assert data.all_captions() == ["b"] and data.dropped == {"missing file": 1}


def test_list_in_parquet_names_images_of_the_folder(tmp_path):
    folder = write_metadata(tmp_path, [])
    (folder / "metadata.jsonl").unlink()
    pq.write_table(pa.table({"file_name": ["a.png", "gone.png"], "text": ["a", "b"], "id": [1, 2]}),
                   folder / "metadata.parquet")
    data = open_dataset(folder)
    assert data.all_captions() == ["a"] and data.metadata(0) == {"id": 1} and data.dropped == {"missing file": 1}


def test_separators_of_lines_inside_a_caption_stay_inside(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "a.txt").write_text("one\u2028two\x0bthree\u0085four\x0cfive\nsecond", encoding="utf-8")
    assert open_dataset(tmp_path).captions(0) == ["one two three four five", "second"]
