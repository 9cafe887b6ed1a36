"""Results are not written into what a command reads, nor over files of others: refused before the work."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from benchmarks.command_line import check_output
from inference.commands.picture_files import save_picture
from inference.image_files.encode import encode_image
from tests import command_line
from tests.test_runs import make_run
from tokenloom_common.errors import UserError
from training.places import check_export_folder, check_run_dir

folder = command_line.folder
run = command_line.run


@pytest.mark.parametrize("below", ["", ".", "pictures", "seq2seq/../x", "../link"])
def test_pictures_are_not_written_into_the_models_folder(run, folder, tmp_path, below):
    (folder.parent / "link").unlink(missing_ok=True)
    (folder.parent / "link").symlink_to(folder)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    before = sorted(folder.rglob("*"))
    for command, given in (("generate", "a heart"), ("reconstruct", tmp_path / "a.png")):
        shown = run(command, given, "--model", folder, "--out", f"{folder}/{below}")
        assert (shown.code, len(shown.err)) == (2, 1)
        assert "lies in the model's folder" in shown.err[0]
    assert sorted(folder.rglob("*")) == before


def test_a_missing_picture_is_named_before_the_others_are_drawn(run, folder, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    names = [tmp_path / "a.png", tmp_path / "b.png"]
    shown = run("reconstruct", *names, "--model", folder, "--out", tmp_path / "out")
    assert (shown.code, shown.out) == (2, [])
    assert shown.err == [f"tokenloom reconstruct: error: {names[1]}: no such file"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["latest.json", "config.yaml", "model/README.md", "thesis.html"])
def test_a_report_replaces_an_older_page_alone(run, tmp_path, name):
    made = make_run(tmp_path / "run")
    path = made / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("<p>precious")
    shown = run("report", made, "--out", path)
    assert (shown.code, len(shown.err)) == (2, 1)
    assert "exists and is not a report of this command" in shown.err[0]
    assert path.read_text() == "<p>precious"


@pytest.mark.long
def test_a_report_may_be_written_again(run, tmp_path):
    made = make_run(tmp_path / "run")
    assert [run("report", made).code for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("name", ["model_index.json", "matcher_index.json", "tokens.json", "config.json"])
def test_a_run_is_not_written_into_a_model_or_token_shards(tmp_path, name):
    (tmp_path / name).write_text('{"kind": "vqgan", "schema_version": 1}')
    for given in (tmp_path, f"{tmp_path}/", f"{tmp_path}/x/.."):
        with pytest.raises(UserError, match=rf"--run_dir .*: is a .*holds {name}"):
            check_run_dir(given)


def test_another_projects_config_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    check_run_dir(tmp_path)


@pytest.mark.parametrize("below", ["", "run", "a/b", "../data/run", "../link/run"])
def test_a_run_is_not_written_into_its_data(tmp_path, below):
    data = tmp_path / "data"
    data.mkdir()
    check_run_dir(data / below, data_path=str(data))  # empty: the reader has more to say
    (data / "a.png").touch()
    (tmp_path / "link").symlink_to(data)
    with pytest.raises(UserError, match="lies in the data folder"):
        check_run_dir(data / below, data_path=str(data))
    check_run_dir(tmp_path / "data2", data_path=str(data))
    check_run_dir(tmp_path, data_path=str(data))  # above its data, which the run leaves alone


@pytest.mark.parametrize("name", ["notes.txt", ".DS_Store", "a-red-heart-seed0.png"])
def test_an_export_folder_with_files_of_others_is_refused(tmp_path, name):
    check_export_folder(tmp_path / "model")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).touch()
    with pytest.raises(UserError, match=f"--run_dir .*model: holds other files .{name}"):
        check_export_folder(tmp_path / "model")


@pytest.mark.parametrize("content", ["# notes", "[1, 2]", '{"usable": 3}'])
def test_a_benchmark_replaces_an_older_document_alone(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(UserError, match="exists and is not a report of this command"):
        check_output(str(path))
    for own in ("", '{"benchmark": "data", "ok": true}'):
        path.write_text(own)
        assert check_output(str(path)) == path


def test_pictures_that_are_written_at_once_get_names_of_their_own(tmp_path):
    pictures = [Image.new("RGB", (64, 64), (number, 0, 0)) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda picture: save_picture(encode_image(picture), tmp_path, "a"), pictures))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    assert [Image.open(path).getpixel((0, 0))[0] for path in paths] == list(range(40))
