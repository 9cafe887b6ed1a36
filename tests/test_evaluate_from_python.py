"""`evaluate_tokenizer` and `evaluate_generator` called from Python: the reports of the commands, and wrong inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tokenloom
from tests import tiny
from tests.bad_images import corrupt_png, encode
from tests.evaluation_images import report_in
from tests.source_files import as_bytes, own_cache, write_parquet  # noqa: F401 (own_cache is a fixture)
from tokenloom import (
    GeneratorEvaluationOptions,
    TokenizerEvaluationOptions,
    evaluate_generator,
    evaluate_tokenizer,
)
from tokenloom_common.errors import DataError, UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """model; data: 8 captioned pictures; bad: one picture that cannot be read."""
    root = tmp_path_factory.mktemp("from_python")
    for name in ("data", "bad"):
        (root / name).mkdir()
    for number, picture in enumerate(tiny.pictures(8, 20)):
        picture.save(root / "data" / f"{number}.png")
        (root / "data" / f"{number}.txt").write_text(tiny.CAPTIONS[number])
    (root / "bad" / "a.png").write_bytes(corrupt_png())
    (root / "bad" / "a.txt").write_text("a")
    return {"model": tiny.model_folder(root / "model"), "data": root / "data", "bad": root / "bad"}


def test_a_tokenizers_report_is_that_of_the_command(folders, tmp_path):
    options = TokenizerEvaluationOptions(num_images=6, seed=2, lpips="none", features="none")
    report = evaluate_tokenizer(folders["model"], folders["data"], options, device="cpu")
    assert list(tmp_path.iterdir()) == []  # nothing is written without `out`
    argv = ["--model", folders["model"], "--data", folders["data"], "--num-images", 6, "--seed", 2, "--lpips", "none",
            "--features", "none", "--device", "cpu", "--out", tmp_path / "command"]
    assert tokenloom.main(["evaluate", "tokenizer", *map(str, argv)]) == 0
    assert json.loads(json.dumps(report)) == report_in(tmp_path / "command")
    again = evaluate_tokenizer(folders["model"], folders["data"], options, device="cpu", out=tmp_path / "python")
    assert again == report
    for name in ("report.json", "side_by_side.png"):
        assert (tmp_path / "python" / name).read_bytes() == (tmp_path / "command" / name).read_bytes()


def test_a_generators_report_is_that_of_the_command(folders, tmp_path):
    options = GeneratorEvaluationOptions(num_captions=4, features="none", top_k=3, guidance=[2.0], batch_size=3)
    report = evaluate_generator(folders["model"], folders["data"], options, device="cpu")
    assert list(tmp_path.iterdir()) == []
    argv = ["--model", folders["model"], "--data", folders["data"], "--num-captions", 4, "--features", "none", "--top-k", 3,
            "--guidance", 2, "--batch-size", 3, "--device", "cpu", "--out", tmp_path / "command"]
    assert tokenloom.main(["evaluate", "generator", *map(str, argv)]) == 0
    written = report_in(tmp_path / "command")
    assert (report["options"].pop("out"), written["options"].pop("out")) == (None, str(tmp_path / "command"))
    assert json.loads(json.dumps(report)) == written
    evaluate_generator(folders["model"], folders["data"], options, device="cpu", out=tmp_path / "python")
    picture = "contact_sheet.png"
    assert (tmp_path / "python" / picture).read_bytes() == (tmp_path / "command" / picture).read_bytes()


def test_both_commands_read_data_that_needs_an_option_to_be_read(folders, tmp_path):
    images = [as_bytes(encode(picture, "PNG")) for picture in tiny.pictures(4, 20)]
    data = write_parquet(tmp_path / "data" / "train.parquet", images, ["wrong"] * 4, alt=tiny.CAPTIONS[:4])
    reading = {"caption_column": "alt"}
    own = {"tokenizer": ["--lpips", "none"], "generator": ["--num-captions", "4"]}
    for name, options in own.items():
        argv = ["--model", folders["model"], "--data", data, "--data.caption_column", "alt", "--features", "none",
                "--device", "cpu", "--out", tmp_path / name, *options]
        assert tokenloom.main(["evaluate", name, *map(str, argv)]) == 0
    assert report_in(tmp_path / "tokenizer")["data"]["reading"] == reading
    report = report_in(tmp_path / "generator")
    assert report["options"]["reading"] == reading
    assert {question["caption"] for question in report["questions"]} == set(tiny.CAPTIONS[:4])


@pytest.mark.parametrize("name", ["tokenizer", "generator"])
def test_a_wrong_way_of_reading_is_refused_before_the_model_is_loaded(tmp_path, capsys, name):
    argv = ["evaluate", name, "--model", "gone", "--data", "gone", "--out", str(tmp_path / "o"), "--format", "folders"]
    assert tokenloom.main(argv) == 2
    assert "unknown data.format 'folders'" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "changes", "words"), [
    (TokenizerEvaluationOptions, {"num_images": 0}, "--num-images 0: give 1 or more"),
    (TokenizerEvaluationOptions, {"batch_size": 0}, "--batch-size 0"),
    (TokenizerEvaluationOptions, {"features": "inception"}, "needs --inception-weights"),
    (GeneratorEvaluationOptions, {"num_captions": 1}, "--num-captions 1: give 2 or more"),
    (GeneratorEvaluationOptions, {"guidance": [2, 2]}, "--guidance 2 2: names a scale twice"),
    (GeneratorEvaluationOptions, {"composition": "maybe"}, "--composition maybe: give auto, yes or no"),
    (GeneratorEvaluationOptions, {"seed": 2**63 - 1}, "give at most")])
def test_options_that_cannot_be_are_refused_when_they_are_made(options, changes, words):
    with pytest.raises(UserError, match=words):
        options(**changes)


@pytest.mark.parametrize(("arguments", "options", "words"), [
    ({"model": "nowhere"}, {}, "nowhere: no such model folder"), ({"data": "nowhere"}, {}, "nowhere: no such file"),
    ({"split": "tets"}, {}, "tets"), ({"device": "nonsense"}, {}, "nonsense: not a device"), ({"out": ""}, {}, "is empty"),
    ({}, {"features": "efnet"}, "unknown feature extractor 'efnet'")])
@pytest.mark.parametrize("evaluate", [evaluate_tokenizer, evaluate_generator])
def test_wrong_inputs_are_user_errors(folders, tmp_path, monkeypatch, evaluate, arguments, options, words):
    monkeypatch.chdir(tmp_path)
    kind = TokenizerEvaluationOptions if evaluate is evaluate_tokenizer else GeneratorEvaluationOptions
    given = {"model": folders["model"], "data": folders["data"], "device": "cpu", "out": tmp_path / "out", **arguments}
    with pytest.raises(UserError, match=words):
        evaluate(options=kind(**{"features": "none", **options}), **given)
    assert list(tmp_path.iterdir()) == []


def test_data_without_a_readable_picture_is_a_data_error(folders):
    with pytest.raises(DataError, match="no usable picture"):
        evaluate_tokenizer(folders["model"], folders["bad"], TokenizerEvaluationOptions(lpips="none", features="none"),
                           device="cpu")
    with pytest.raises(UserError, match="unknown LPIPS network 'vgg'"):
        evaluate_tokenizer(folders["model"], folders["data"], TokenizerEvaluationOptions(lpips="vgg", features="none"))
