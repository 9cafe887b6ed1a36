"""`tokenloom evaluate tokenizer`: its report and numbers, and every wrong use in one line."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

import tokenloom
from tests import launching, tiny
from tests.bad_images import corrupt_png
from tests.evaluation_images import (
    SIDE,
    disc,
    inception_state,
    report_in,
    scipy_distance,
    stack,
    stripes,
    tiny_extractor,
    tokenizer,
)
from tokenizer_image.images import image_to_pixels, pixels_to_float
from training.data.sources.open_dataset import open_dataset
from training.evaluation.image_metrics.features import EXTRACTORS
from training.evaluation.image_metrics.frechet import CROP, RESIZE
from training.evaluation.image_metrics.pixel_metrics import ssim
from training.evaluation.image_metrics.reference import load_reference
from training.evaluation.reconstruction import ReconstructionOptions, measure_reconstruction

BAR = re.compile(r"measure reconstruction: +\d+%\|")  # tqdm's lines on stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """model: a tokenizer's folder; data: 24 pictures and one that is damaged; file: somebody's file."""
    root = tmp_path_factory.mktemp("evaluate")
    data = root / "data"
    data.mkdir()
    for number in range(24):
        (disc if number % 2 else stripes)(number, 40).save(data / f"{number:02}.png")
    (data / "24.png").write_bytes(corrupt_png())
    for number in range(25):
        (data / f"{number:02}.txt").write_text(f"picture {number}")
    (root / "file").write_text("somebody's")
    return {"model": tokenizer().save_pretrained(root / "tokenizer"), "data": data, "file": root / "file"}


class Ran(NamedTuple):
    code: int
    out: list[str]
    err: list[str]  # without the progress bar
    measured: bool  # whether there was a progress bar


@pytest.fixture
def run(capsys, monkeypatch, folders):
    """`tokenloom evaluate tokenizer` with the folders above and a fast stand-in for features, unless told otherwise."""
    monkeypatch.delenv("TOKENLOOM_DEBUG", raising=False)
    monkeypatch.setitem(EXTRACTORS, "tiny", lambda weights: tiny_extractor())

    def call(*arguments: object, **changed: object) -> Ran:
        options = {"model": folders["model"], "data": folders["data"], "lpips": "none", "features": "tiny", "device": "cpu",
                   **changed}
        given = [str(word) for name, value in options.items() if value is not None for word in (f"--{name}", value)]
        capsys.readouterr()
        code = tokenloom.main(["evaluate", "tokenizer", *given, *map(str, arguments)])
        shown = capsys.readouterr()
        lines = [line for line in shown.err.splitlines() if line]
        rest = [line for line in lines if not BAR.match(line)]
        return Ran(code, shown.out.splitlines(), rest, rest != lines)
    return call


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(inception_state(), path)
    return path


@pytest.mark.long
def test_the_command_measures_with_the_real_networks(run, folders, tmp_path):
    shown = run(lpips="alexnet", features="effnet-lite0", out=tmp_path / "out")
    assert shown.code == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.json", "side_by_side.png"]
    report = report_in(tmp_path / "out")
    assert set(report) == {"command", "schema_version", "metrics", "frechet", "lpips", "tokenizer", "data", "options",
                           "versions"}
    assert list(report["metrics"]) == ["psnr", "ssim", "lpips_alexnet", "reconstruction_spread", "EffNet-FD", "codebook_usage",
                                       "codebook_perplexity", "bits_per_pixel", "pictures"]
    assert "FID" not in (tmp_path / "out" / "report.json").read_text()
    values = {name: metric["value"] for name, metric in report["metrics"].items()}
    assert all(math.isfinite(value) for value in values.values())
    assert values["bits_per_pixel"] == 6 * 64 / 32**2  # log2 64 bits a code
    assert (values["pictures"], report["data"]["rows"], report["data"]["unusable"]) == (24, 25, {"corrupt": 1})
    assert report["data"] | {"split": "train", "resize": RESIZE, "crop": CROP} == report["data"]
    assert report["tokenizer"] | {"kind": "vqgan", "grid": [8, 8], "codebook_size": 64, "resolution": 32} == report["tokenizer"]
    assert report["versions"]["torch"] == torch.__version__
    assert [line.split(": ")[0] for line in shown.out] == list(report["metrics"])
    assert shown.out[0] == f"psnr: {values['psnr']:.4f} dB"
    assert shown.out[-1] == "pictures: 24 pictures"
    assert report["frechet"]["samples_fewer_than_dimensions"] is True
    assert len(shown.err) == 1
    assert "1280 features over too few pictures (24 against 24)" in shown.err[0]
    with Image.open(tmp_path / "out" / "side_by_side.png") as sheet:
        assert sheet.height == 44 + 3 * 136
        assert 10 * 136 < sheet.width < 10 * 136 + 150


@pytest.mark.long
def test_the_commands_of_the_page_run_on_a_whole_model_folder(capsys, folders, tmp_path, monkeypatch):
    page = (launching.REPOSITORY / "docs" / "evaluation.md").read_text(encoding="utf-8")
    command, generator = re.findall(r"^```bash\n(.*?)\n```$", page, flags=re.MULTILINE | re.DOTALL)
    tiny.model_folder(tmp_path / "demo" / "model")
    (tmp_path / "my_pictures").symlink_to(folders["data"])
    monkeypatch.chdir(tmp_path)
    assert tokenloom.main(shlex.split(command)[1:]) == 0
    assert (tmp_path / "results" / "quick" / "side_by_side.png").is_file()
    report = report_in(tmp_path / "results" / "quick")
    assert report["tokenizer"] | {"resolution": 16, "grid": [4, 4], "folder": "demo/model"} == report["tokenizer"]
    names = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == list(report["metrics"])
    assert all(f"`{name}`" in page for name in {*names, "EffNet-FD", "rFID", "Inception-FD", "lpips_vgg16"} - {"pictures"})
    assert tokenloom.main(shlex.split(generator)[1:]) == 0
    names = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == list(report_in(tmp_path / "results" / "generator")["metrics"])
    assert all(f"`{name}`" in page for name in names)


def test_the_numbers_are_those_of_the_pictures_one_by_one(folders):
    model, source, extractor = tokenizer(), open_dataset(folders["data"]), tiny_extractor()
    found = measure_reconstruction(model, source, ReconstructionOptions(batch_size=7, extractor=extractor))
    original = stack([Image.fromarray(image_to_pixels(source[row].image, SIDE)) for row in range(24)])
    codes = model.encode(pixels_to_float(original))
    rebuilt = ((model.decode(codes).permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8)
    assert found.rows == list(range(24))
    assert found.psnr == pytest.approx(numpy.mean([peak_signal_noise_ratio(a.numpy(), b.numpy()) for a, b in zip(
        original, rebuilt, strict=True)]), abs=1e-4)
    assert found.ssim == pytest.approx(float(ssim(original, rebuilt).mean()), abs=1e-5)
    real, fake = extractor(original).double(), extractor(rebuilt).double()
    assert found.frechet.distance == pytest.approx(scipy_distance(real.mean(0), real.T.cov(), fake.mean(0), fake.T.cov()),
                                                   rel=1e-3)
    used, counts = codes.unique(return_counts=True)
    shares = counts / counts.sum()
    assert found.usage.usage == len(used) / 64
    assert found.usage.perplexity == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-5)
    assert found.usage.dead_codes == 64 - len(used)


@pytest.mark.long
def test_batch_size_changes_no_number_and_a_second_run_is_equal(run, tmp_path):
    reports = []
    for name, size in (("a", 3), ("b", 64), ("c", 64)):
        assert run(out=tmp_path / name, **{"batch-size": size, "lpips": "alexnet"}).code == 0
        reports.append(report_in(tmp_path / name))
    assert (tmp_path / "b" / "report.json").read_bytes() == (tmp_path / "c" / "report.json").read_bytes()
    assert (tmp_path / "b" / "side_by_side.png").read_bytes() == (tmp_path / "c" / "side_by_side.png").read_bytes()
    values = [{name: metric["value"] for name, metric in report["metrics"].items()} for report in reports]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert reports[0]["data"] == reports[1]["data"]


@pytest.mark.long
def test_the_seed_decides_the_sample_and_nothing_else(run, tmp_path):
    found = {}
    for name, more in {"all": {}, "all again": {"seed": 7}, "8 of 0": {"num-images": 8}, "8 of 0 again": {"num-images": 8},
                       "8 of 7": {"num-images": 8, "seed": 7}}.items():
        assert run(out=tmp_path / name, **more).code == 0
        found[name] = report_in(tmp_path / name)
    prints = {name: report["data"]["fingerprint"] for name, report in found.items()}
    assert prints["all"] == prints["all again"]
    assert prints["8 of 0"] == prints["8 of 0 again"] != prints["8 of 7"]
    assert found["8 of 7"]["data"]["pictures"] + found["8 of 7"]["data"]["unusable"].get("corrupt", 0) == 8
    assert found["8 of 7"]["options"] | {"num_images": 8, "seed": 7} == found["8 of 7"]["options"]


@pytest.mark.long
def test_a_saved_reference_gives_the_same_number_and_says_whose_it_is(run, tmp_path, monkeypatch):
    first = run(out=tmp_path / "a", **{"save-reference": tmp_path / "r.npz"})
    second = run(out=tmp_path / "b", reference=tmp_path / "r.npz")
    assert (first.code, second.code) == (0, 0)
    one, two = report_in(tmp_path / "a"), report_in(tmp_path / "b")
    assert one["metrics"] == two["metrics"]
    assert one["frechet"] == two["frechet"]
    assert two["frechet"]["reference_is_these_pictures"] is True
    assert two["frechet"]["reference_fingerprint"] == load_reference(tmp_path / "r.npz").fingerprint
    other = run(out=tmp_path / "c", reference=tmp_path / "r.npz", **{"num-images": 16})
    three = report_in(tmp_path / "c")["frechet"]
    assert other.code == 0
    assert (three["reference_is_these_pictures"], three["reference_samples"]) == (False, 24)
    assert three["samples"] == report_in(tmp_path / "c")["data"]["pictures"] <= 16
    again = run(out=tmp_path / "d", **{"save-reference": tmp_path / "r.npz"})  # an earlier one of ours may be replaced
    assert again.code == 0
    monkeypatch.setitem(EXTRACTORS, "tiny", lambda weights: tiny_extractor(weights_hash="1" * 64))
    refused = run(out=tmp_path / "e", reference=tmp_path / "r.npz")
    assert (refused.code, refused.out, len(refused.err), refused.measured) == (2, [], 1, False)
    assert "r.npz: reference statistics with weights hash 000" in refused.err[0]


def test_a_number_can_be_left_out(run, tmp_path):
    assert run(out=tmp_path / "a", features="none").code == 0
    report = report_in(tmp_path / "a")
    assert list(report["metrics"]) == ["psnr", "ssim", "reconstruction_spread", "codebook_usage", "codebook_perplexity",
                                       "bits_per_pixel", "pictures"]
    assert report["frechet"] is None
    assert report["lpips"] is None


@pytest.mark.long
def test_inception_by_path_and_the_name_of_its_number(run, tmp_path, inception_file):
    shown = run(features="inception", out=tmp_path / "a", **{"inception-weights": inception_file, "num-images": 2})
    assert shown.code == 0
    assert any(re.fullmatch(r"Inception-FD: [\d.e-]+ \(squared distance, 0 = equal\)", line) for line in shown.out)
    assert "the weights are not the published pt_inception-2015-12-05-6726825d.pth" in shown.err[0]


def test_a_folder_of_results_is_replaced_and_other_peoples_files_are_not(run, folders, tmp_path):
    out = tmp_path / "out"
    assert run(out=out, **{"num-images": 8}).code == 0
    assert run(out=out, **{"num-images": 12}).code == 0
    assert report_in(out)["options"]["num_images"] == 12
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    (out / "notes.txt").write_text("mine")
    shown = run(out=out)
    assert (shown.code, shown.out, len(shown.err), shown.measured) == (2, [], 1, False)
    assert "holds other files (notes.txt)" in shown.err[0]
    (out / "notes.txt").unlink()
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    (out / "report.json").write_text('{"a": 1}')
    shown = run(out=out)
    assert (shown.code, len(shown.err)) == (2, 1)
    assert "exists and is not a report of `tokenloom evaluate tokenizer`" in shown.err[0]
    assert (out / "report.json").read_text() == '{"a": 1}'


WRONG = {
    "no model": ({"model": "{tmp}/nowhere"}, "{tmp}/nowhere: no such model folder"),
    "model not given": ({"model": None}, "--model"),
    "no data": ({"data": "{tmp}/nowhere"}, "{tmp}/nowhere: no such file or folder"),
    "unknown split": ({"split": "trian"}, "no split 'trian'; did you mean 'train'?"),
    "unknown extractor": ({"features": "effnet-lite"}, "unknown feature extractor 'effnet-lite'; did you mean 'effnet-lite0'?"),
    "unknown lpips": ({"lpips": "vgg"}, "unknown LPIPS network 'vgg'; did you mean 'vgg16'?"),
    "inception without weights": ({"features": "inception"}, "--features inception needs --inception-weights FILE"),
    "weights without inception": ({"inception-weights": "{tmp}/w"}, "--inception-weights is for --features inception"),
    "weights missing": ({"features": "inception", "inception-weights": "{tmp}/w"}, "{tmp}/w: no such weights file"),
    "weights damaged": ({"features": "inception", "inception-weights": "{file}"}, "{file}: "),
    "no pictures": ({"num-images": 0}, "--num-images 0: give 1 or more"),
    "more than there are": ({"num-images": 26}, "--num-images 26: give 1 to 25"),
    "one picture": ({"num-images": 1}, "at least 2 pictures"),
    "batch of none": ({"batch-size": 0}, "--batch-size 0"),
    "negative seed": ({"seed": -1}, "--seed -1"),
    "huge seed": ({"seed": 10**30}, "--seed 1000"),
    "out below a file": ({"out": "{file}/sub/out"}, "--out {file}/sub/out: cannot be written to"),
    "out is empty": ({"out": ""}, "--out is empty"),
    "saved below a file": ({"save-reference": "{file}/r.npz"}, "--save-reference {file}/r.npz: cannot be written to"),
    "out is a file": ({"out": "{file}"}, "{file}: is a file"),
    "unknown flag": ({"sedd": 1}, "--sedd"),
    "no device": ({"device": "nonsense"}, "--device nonsense"),
    "reference missing": ({"reference": "{tmp}/r.npz"}, "{tmp}/r.npz: no such file of reference statistics"),
    "reference is another file": ({"reference": "{file}"}, "{file}: not a whole file of reference statistics"),
    "reference without features": ({"features": "none", "reference": "{file}"}, "--reference holds features"),
    "saved without features": ({"features": "none", "save-reference": "{tmp}/r.npz"}, "--save-reference holds features"),
    "both references": ({"reference": "{file}", "save-reference": "{tmp}/r.npz"}, "give one"),
    "saved over another file": ({"save-reference": "{npz}"}, "{npz}: not a whole file of reference statistics"),
    "saved without suffix": ({"save-reference": "{tmp}/r"}, "ends in .npz"),
    "saved into out": ({"save-reference": "{tmp}/out/r.npz"}, "lies in --out"),
}


@pytest.mark.parametrize(("changed", "words"), WRONG.values(), ids=WRONG)
def test_every_wrong_use_is_one_line(run, folders, tmp_path, changed, words):
    npz = tmp_path / "others.npz"
    npz.write_text("mine")
    places = {"tmp": tmp_path, "file": folders["file"], "npz": npz}
    given = {name: value.format(**places) if isinstance(value, str) else value for name, value in changed.items()}
    shown = run(**{"out": tmp_path / "out", **given})
    one_picture = changed.get("num-images") == 1
    assert (shown.code, shown.measured) == (4 if one_picture else 2, one_picture)  # all others before anything slow
    assert shown.out == []
    assert len(shown.err) == 1
    assert shown.err[0].startswith("tokenloom evaluate: error: ")
    assert words.format(**places) in shown.err[0]
    assert len(shown.err[0]) < 500
    assert not (tmp_path / "out").exists()
    assert (npz.read_text(), folders["file"].read_text()) == ("mine", "somebody's")
    assert [p.name for p in tmp_path.iterdir()] == ["others.npz"]


def test_pictures_too_small_for_a_network_are_one_line(run, tmp_path):
    small = tokenizer(16).save_pretrained(tmp_path / "small")
    shown = run(model=small, lpips="alexnet", out=tmp_path / "out")
    assert (shown.code, len(shown.err)) == (2, 1)
    assert "have 16 pixels on a side; LPIPS with alexnet needs 31 or more: choose another --lpips, or none" in shown.err[0]
    assert run(model=small, lpips="vgg16", out=tmp_path / "out", **{"num-images": 3}).code == 0
    tiny = tokenizer(8).save_pretrained(tmp_path / "tiny")
    shown = run(model=tiny, out=tmp_path / "out")
    assert (shown.code, len(shown.err)) == (2, 1)
    assert "have 8 pixels on a side; SSIM needs 11 or more" in shown.err[0]


def test_data_without_a_readable_picture_is_exit_code_4(run, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(corrupt_png())
    (tmp_path / "bad" / "a.txt").write_text("a")
    shown = run(data=tmp_path / "bad", out=tmp_path / "out")
    assert (shown.code, len(shown.err)) == (4, 1)
    assert "no usable picture" in shown.err[0]


@pytest.mark.parametrize(("argv", "words"), [
    (["tokeniser"], "unknown thing to evaluate 'tokeniser'; did you mean 'tokenizer'?"),
    (["zzz"], "valid names: generator, tokenizer"), ([], "required: what"),
    (["--model", "x"], "unknown thing to evaluate '--model'")])
def test_an_unknown_thing_to_evaluate_is_one_line(capsys, argv, words):
    assert tokenloom.main(["evaluate", *argv]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert words in shown.err
