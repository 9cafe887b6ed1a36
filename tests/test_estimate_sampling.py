"""`tokenloom estimate` of sampling: figures of a model folder or a preset, before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from inference.memory.estimate import (
    Workload,
    estimate,
    largest_batch,
)
from tests import tiny
from tests.test_memory import preset

GIB, MIB = 1 << 30, 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("models") / "tiny")


def test_a_folder_is_estimated_from_its_configs_alone(run, folder, tmp_path):
    for weights in folder.rglob("*.safetensors"):
        assert weights.stat().st_size
    shown = json.loads(run(folder, "--num-images", 3, "--batch-size", 2, "--json", "--memory", "1 GiB")[1])
    config = tiny.seq2seq(text_vocab_size=tiny.text_tokenizer().vocab_size).config
    found = estimate(config, tiny.vqgan().config, Workload.of_request(1, 3, 2))
    assert shown["bytes"]["weights"] == found.weights
    assert shown["bytes"]["image_tokenizer"] == sum(t.nbytes for t in (*tiny.vqgan().parameters(), *tiny.vqgan().buffers()))
    assert shown["bytes"]["total"] == found.total
    assert (shown["rows"], shown["pictures_at_once"], shown["guidance_scale"]) == (4, 2, 2.0)
    assert (shown["memory"], shown["fits"]) == (GIB, True)
    assert shown["largest_batch"] == largest_batch(config, tiny.vqgan().config, Workload.of_request(1, 3, 2), GIB)


def test_no_weight_is_read(run, folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for weights in copy.rglob("*.safetensors"):
        weights.unlink()
    before, after = (json.loads(run(path, "--json", "--memory", "1GiB")[1]) for path in (folder, copy))
    assert {**before, "model": ""} == {**after, "model": ""}


def test_the_table_has_every_part_and_its_total(run, folder):
    code, out, err = run(folder, "--memory", "8GiB")
    assert (code, err) == (0, [])
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line}
    parts = json.loads(run(folder, "--json", "--memory", "8GiB")[1])["bytes"]
    assert {name: int(lines[name][1].replace(",", "")) for name in parts} == parts
    assert lines["total"][2] == f"{parts['total'] / MIB:,.2f}"
    assert "; fits" in out
    assert "largest number of pictures at a time that fits: " in out


def test_guidance_off_and_types_change_the_figures(run, folder):
    def parts(*arguments):
        return json.loads(run(folder, "--json", "--memory", "1GB", *arguments)[1])["bytes"]

    assert parts("--guidance", 1)["self_cache"] * 2 == parts()["self_cache"] == parts("--dtype", "int8")["self_cache"]
    assert parts("--dtype", "bfloat16")["weights"] * 2 == parts()["weights"] > parts("--dtype", "int8")["weights"]


def test_what_does_not_fit_is_said_and_is_no_error(run):
    code, out, err = run("parti-3b", "--num-images", 64, "--batch-size", 64, "--memory", "20GiB")
    assert (code, err) == (0, [])
    assert "does not fit" in out
    assert "not counted: an image tokenizer: a preset has none" in out
    assert int(out.rsplit(" ", 1)[1]) == largest_batch(preset("parti-3b"), None, Workload(kept=64), 20 * GIB) > 0


def test_without_memory_this_machines_counts(run):
    shown = json.loads(run("debug", "--json")[1])
    assert (shown["memory_source"], shown["fits"]) == ("cpu", True)
    assert shown["memory"] > 50 * MIB


def test_a_presets_sizes_are_options(run):
    shown = json.loads(run("llamagen-l", "--grid", "24x16", "--codebook-size", 1000, "--text-length", 9, "--vocab-size", 77,
                           "--json", "--memory", "1GB")[1])
    config = preset("llamagen-l", grid=(24, 16), codebook_size=1000, text_length=9, text_vocab_size=77)
    assert shown["bytes"]["weights"] == estimate(config, None, Workload()).weights
    assert shown["bytes"]["self_cache"] == estimate(config, None, Workload()).self_cache
    assert shown["not_counted"] == ["an image tokenizer: a preset has none"]


def test_a_frozen_text_encoder_is_named_as_not_counted(run, folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "text_tokenizer": "frozen"}))
    (copy / "text_tokenizer" / "config.json").write_text(json.dumps({
        "kind": "frozen", "schema_version": 1, "name": "google/t5-big", "fingerprint": "0" * 16, "feature_width": 24,
        "text_length": 12}))
    assert "not counted: the frozen text encoder google/t5-big\n" in run(copy, "--memory", "1GB")[1]


@pytest.mark.parametrize(("argv", "words"), [
    (["parti-3"], "did you mean 'parti-3b'"), (["nowhere/at/all"], "no such model folder"), ([""], "empty name"),
    ([], "required: model"), (["debug", "--memory", "8"], None), (["debug", "--memory", "much"], "such as 8GiB"),
    (["debug", "--memory", "8 gigs"], "KiB"), (["debug", "--memory", "-1GiB"], "memory"), (["debug", "--memory", ""], "8GiB"),
    (["debug", "--memory", "9" * 5000], "8GiB"), (["debug", "--memory", "8GiB", "--device", "cpu"], "give one"),
    (["debug", "--device", "quantum"], "not a device"), (["debug", "--num-images", "0"], "num_images must be"),
    (["debug", "--batch-size", "-2"], "batch_size must be"), (["debug", "--num-images", "x"], "invalid int"),
    (["debug", "--guidance", "-1"], "guidance_scale"), (["debug", "--guidance", "nan"], "guidance_scale"),
    (["debug", "--dtype", "int4"], "invalid choice"), (["debug", "--grid", "16"], "rows x columns"),
    (["debug", "--grid", "0x4"], "at least one row"), (["debug", "--grid", "999x999"], "at most 65,536"),
    (["debug", "--codebook-size", "1"], "codebook_size"), (["debug", "--text-length", "0"], "text_length"),
    (["debug", "--vocab-size", "1"], "text_vocab_size"), (["debug", "--vocab-size", "9" * 17], "no model can be built"),
    (["debug", "--mem", "8GiB"], "unrecognized"), (["FOLDER", "--grid", "4x4"], "--grid is for presets")])
def test_every_wrong_use_is_one_line(run, folder, argv, words):
    code, out, err = run(*[folder if word == "FOLDER" else word for word in argv])
    if words is None:  # 8 bytes are a size like any other
        assert (code, err) == (0, [])
        assert "does not fit" in out
        return
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith("tokenloom estimate: error: ")
    assert words in err[0]
