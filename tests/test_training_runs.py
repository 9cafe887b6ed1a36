"""The training scripts as processes: two under the launcher, one without, stopped and resumed, and given bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests import launching
from tests.bad_images import REFUSED
from tokenizer_image import VQGAN
from tokenloom import TextToImage
from training.data.builders.shapes import build_shapes
from training.data.tokens.shards import TokenShards
from training.runs.metrics import read_metrics

pytestmark = pytest.mark.long  # its fixtures start processes or train

TOKENIZER, ENCODE, SEQ2SEQ = (f"training/{name}.py" for name in ("train_tokenizer", "encode_dataset", "train_seq2seq"))


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Both stages trained by two `deepspeed` processes on rendered scenes; many tests look at what they left."""
    folder = tmp_path_factory.mktemp("runs")
    build_shapes(folder / "data", size=16, num_scenes=120, seed=0)
    results = {"tokenizer": launching.deepspeed(
        2, TOKENIZER, "--config", launching.RECIPES / "debug_tokenizer.yaml", "--data.path", folder / "data",
        "--run_dir", folder / "tokenizer", "--data.validation_split", "unseen_combination", "--deepspeed.zero_stage", 2,
        "--adversarial.weight", 0.02, "--adversarial.start_step", 30, "--adversarial.discriminator.channels", 8,
        "--adversarial.discriminator.layers", 1, "--adversarial.lecam_weight", 0.01, "--train.weight_ema", 0.5)}
    results["encode"] = launching.deepspeed(2, ENCODE, "--image_tokenizer", folder / "tokenizer/model", "--data.path",
                                            folder / "data", "--out", folder / "tokens", "--shard_rows", 30)
    results["seq2seq"] = launching.deepspeed(
        2, SEQ2SEQ, "--config", launching.RECIPES / "debug_seq2seq.yaml", "--data.path", folder / "tokens",
        "--image_tokenizer", folder / "tokenizer/model", "--run_dir", folder / "seq2seq",
        "--data.validation_split", "unseen_combination", "--deepspeed.zero_stage", 2, "--train.validate_every", 20,
        "--log.tensorboard", True)
    results["alone"] = launching.python(
        TOKENIZER, "--config", "debug_tokenizer.yaml", "--data.path", folder / "data", "--run_dir", folder / "alone",
        "--train.steps", 2, "--train.precision", "bfloat16", "--deepspeed.zero_stage", 0, "--train.sample_every", 1)
    results["alone seq2seq"] = launching.python(
        SEQ2SEQ, "--config", "debug_seq2seq.yaml", "--data.path", folder / "tokens", "--image_tokenizer",
        folder / "tokenizer/model", "--run_dir", folder / "bfloat16", "--train.steps", 3, "--train.precision", "bfloat16",
        "--train.sample_every", 2)
    for name, result in results.items():
        assert result.returncode == 0, f"{name}: {result.stderr[-3000:]}"
    return folder


def lines(run: Path) -> list[dict]:
    """Of the training, without those of the held-out split."""
    return [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in lines(run)]


@pytest.mark.parametrize("stage", ["tokenizer", "seq2seq"])
def test_two_deepspeed_processes_train_and_the_loss_falls(work, stage):
    values = losses(work / stage)
    assert len(values) == 13
    assert values[-1] < 0.75 * values[0]
    assert all(later < values[0] for later in values[2:])


@pytest.mark.parametrize("stage", ["tokenizer", "seq2seq"])
def test_a_run_folder_holds_what_it_promises(work, stage):
    run = work / stage
    rows = lines(run)
    assert [row["step"] for row in rows] == [1, *range(5, 61, 5)]
    expected = {"step", "loss", "lr", "samples_per_s", "grad_norm", "data_wait", "memory_bytes"}
    assert all(expected <= row.keys() and "mfu" not in row for row in rows)
    assert all(("tokens_per_s" in row) == (stage == "seq2seq") for row in rows)
    assert rows[0]["lr"] < max(row["lr"] for row in rows) == pytest.approx(0.003 if stage == "seq2seq" else 0.002, rel=0.01)
    assert json.loads((run / "latest.json").read_text()) == {"step": 60, "checkpoint": "checkpoints/step-00000060"}
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000040", "step-00000060"]
    assert sorted(p.name for p in (run / "samples").glob("*.png")) == ["step-00000030.png", "step-00000060.png"]
    assert json.loads((run / "env.json").read_text())["packages"]["deepspeed"][0].isdigit()
    assert f"run_dir: {run}" in (run / "config.yaml").read_text()
    assert json.loads((run / "validation.json").read_text())


def test_two_processes_measure_the_held_out_split_and_one_of_them_writes(work):
    run = work / "seq2seq"
    found = {row["step"]: row["validation_loss"] for row in read_metrics(run / "metrics.jsonl") if "validation_loss" in row}
    assert list(found) == [20, 40, 60]
    assert found[60] == json.loads((run / "validation.json").read_text())["loss"] < found[20]
    assert len(list((run / "tensorboard").iterdir())) == 1


def test_two_processes_train_two_networks(work):
    rows = read_metrics(work / "tokenizer/metrics.jsonl")
    assert [row["step"] for row in rows if "discriminator" in row] == list(range(35, 61, 5))
    assert rows[-1]["discriminator"] < 1  # 1 is what a discriminator that knows nothing has
    assert rows[-1]["skipped_steps"] == 0
    checkpoint = work / "tokenizer/checkpoints/step-00000060"
    assert {"deepspeed", "deepspeed-discriminator"} <= {path.name for path in checkpoint.iterdir()}
    assert {"curves.png", "codebook.png"} <= {path.name for path in (work / "tokenizer").iterdir()}


def test_bfloat16_trains_both_stages(work):
    for run in ("alone", "bfloat16"):
        assert all(0 < loss < 10 for loss in losses(work / run))
        assert (work / run / "model").is_dir()


def test_codebook_health_is_logged_from_the_first_step(work):
    rows = read_metrics(work / "tokenizer/metrics.jsonl")
    assert all(row["dead_codes"] == round(64 * (1 - row["codebook_usage"])) and row["restarted_codes"] >= 0 for row in rows)
    assert all(0 < row["codebook_usage"] <= 1 and 1 <= row["codebook_perplexity"] <= 64 for row in rows)
    assert rows[0]["step"] == 1


def test_the_two_processes_wrote_whole_shards_in_order(work):
    shards = TokenShards(work / "tokens", "train")
    assert len(shards.index.splits["train"].files) > 2
    keys = [shards.key(row) for row in range(len(shards))]
    assert len(set(keys)) == len(keys)
    tokenizer = VQGAN.from_pretrained(work / "tokenizer/model")
    from tests.encode_again import tokens_of_row

    assert shards.image_tokens(0).tolist() == tokens_of_row(tokenizer, work / "data", 0)
    assert shards.image_tokens(len(shards) - 1).tolist() == tokens_of_row(tokenizer, work / "data", len(shards) - 1)


def test_the_exported_model_folder_samples(work):
    model = TextToImage.from_pretrained(work / "seq2seq/model", device="cpu")
    assert model.default_params.guidance_scale == 2.0
    result = model.generate("a red circle", num_images=2, seed=0)
    assert result.images[0].size == (16, 16)
    card = (work / "seq2seq/model/README.md").read_text()
    assert "pipeline_tag: text-to-image" in card
    assert "not measured" not in card


def test_a_finished_run_started_again_says_so_and_changes_no_result(work):
    results = ("metrics.jsonl", "latest.json", "validation.json", "model/README.md", "model/seq2seq/model.safetensors")
    (work / "seq2seq/model/README.md").write_text((work / "seq2seq/model/README.md").read_text() + "\nMy own words.\n")
    before = [(work / "seq2seq" / name).read_bytes() for name in results]
    result = launching.deepspeed(2, SEQ2SEQ, "--config", work / "seq2seq/config.yaml")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "already trained to step 60" in result.stderr
    assert [(work / "seq2seq" / name).read_bytes() for name in results] == before


def tokenizer_arguments(work: Path, run: Path, *more: object) -> list[object]:
    return [TOKENIZER, "--config", launching.RECIPES / "debug_tokenizer.yaml", "--data.path", work / "data", "--run_dir", run,
            "--train.log_every", 2, "--train.sample_every", 1, "--model.dropout", 0.1, "--data.horizontal_flip", 0.5, *more]


@pytest.mark.slow  # tests/test_exact_resume.py looks at it in a fraction of the time, without the scripts' own start
def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(work, tmp_path):
    whole = launching.python(*tokenizer_arguments(work, tmp_path / "whole", "--train.steps", 24))
    assert whole.returncode == 0, whole.stderr[-2000:]
    command = [sys.executable, *map(str, tokenizer_arguments(work, tmp_path / "parts", "--train.steps", 24))]
    with subprocess.Popen(command, cwd=launching.REPOSITORY, env=launching.environment(), stderr=subprocess.PIPE,
                          text=True) as first:
        metrics = tmp_path / "parts/metrics.jsonl"
        deadline = time.monotonic() + 120
        while len(read_metrics(metrics)) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        first.send_signal(signal.SIGTERM)
        message = first.stderr.read()
        assert first.wait(60) == 143, message[-2000:]
    assert "stopped by signal 15 after a checkpoint" in message
    stopped = json.loads((tmp_path / "parts/latest.json").read_text())["step"]
    assert 6 <= stopped < 24
    rest = launching.python(*tokenizer_arguments(work, tmp_path / "parts", "--train.steps", 24))
    assert rest.returncode == 0, rest.stderr[-2000:]
    assert f"continuing from {tmp_path}/parts/checkpoints/step-{stopped:08d}" in rest.stderr
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert [row["step"] for row in rows[1]] == [1, *range(2, 25, 2)]
    for a, b in zip(*rows, strict=True):
        assert (a["loss"].hex(), a["grad_norm"].hex(), a["codebook_perplexity"]) == (
            b["loss"].hex(), b["grad_norm"].hex(), b["codebook_perplexity"])


@pytest.mark.slow
def test_ctrl_c_under_the_launcher_leaves_a_checkpoint(work, tmp_path):
    run = tmp_path / "run"
    arguments = [*tokenizer_arguments(work, run, "--train.steps", 5000, "--checkpoint.every_steps", 0)]
    command = ["deepspeed", "--num_accelerators", "2", "--master_port", launching.free_port(), *arguments]
    with subprocess.Popen(list(map(str, command)), cwd=launching.REPOSITORY, env=launching.environment(), text=True,
                          stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True) as running:
        deadline = time.monotonic() + 120
        while len(read_metrics(run / "metrics.jsonl")) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGINT)  # what a terminal does on Ctrl-C: every process of the group gets it
        message = running.stderr.read()
        assert running.wait(60) != 0
    assert "after a checkpoint" in message, message[-2000:]
    step = json.loads((run / "latest.json").read_text())["step"]
    assert (run / f"checkpoints/step-{step:08d}/MANIFEST.json").is_file()


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(work, tmp_path):
    run = Path(shutil.copytree(work / "tokenizer", tmp_path / "run"))
    newest = next((run / "checkpoints/step-00000060/deepspeed").glob("*model_states.pt"))
    newest.write_bytes(newest.read_bytes()[:-1])
    result = launching.deepspeed(2, TOKENIZER, "--config", work / "tokenizer/config.yaml", "--run_dir", run)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "step-00000060 is not usable" in result.stderr
    assert "continuing from" in result.stderr
    assert "step-00000040" in result.stderr
    assert losses(run) == losses(work / "tokenizer")  # the repeated steps came out the same


@pytest.mark.parametrize("kind", ["seq2seq", pytest.param("tokenizer", marks=pytest.mark.slow)])
def test_another_number_of_processes_goes_on_with_the_same_data_and_losses(work, tmp_path, kind):
    """Two networks at stage 2 for the tokenizer; two processes before, one after. A tokenizer restarts dead codes by chance and
    weighs its adversary by the pictures of each process, so that its losses are near, not equal."""
    run = Path(shutil.copytree(work / kind, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints/step-00000060")
    script = SEQ2SEQ if kind == "seq2seq" else TOKENIZER
    result = launching.python(script, "--config", work / kind / "config.yaml", "--run_dir", run)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "step-00000040 was written by 2 processes, and 1 go on" in result.stderr
    before, after = losses(work / kind), losses(run)
    assert after == pytest.approx(before, rel=1e-5 if kind == "seq2seq" else 0.02)
    assert len(after) == len(before)
    assert not list((run / "checkpoints").glob(".*"))


def bad_data(folder: Path, good: int) -> Path:
    """An image folder with every kind of bad picture and `good` good ones."""
    folder.mkdir()
    for number in range(good):
        Image.new("RGB", (20, 20), (number * 5 % 255, 80, 120)).save(folder / f"good{number}.png")
        (folder / f"good{number}.txt").write_text(f"picture {number}")
    for name, (picture, _) in REFUSED.items():
        (folder / f"bad {name}.png").write_bytes(picture)
        (folder / f"bad {name}.txt").write_text(f"broken {name}")
    return folder


@pytest.mark.parametrize(("limit", "code"), [(0.9, 0), (0.01, 4)])
def test_unusable_pictures_are_counted_skipped_and_end_the_run_above_the_limit(tmp_path, limit, code):
    data = bad_data(tmp_path / "data", 40)
    result = launching.python(TOKENIZER, "--config", "debug_tokenizer.yaml", "--data.path", data, "--run_dir",
                              tmp_path / "run", "--train.steps", 8, "--train.sample_every", 0, "--data.max_bad_fraction", limit)
    assert result.returncode == code, result.stderr[-2000:]
    assert ("more than --data.max_bad_fraction" if code else "passed over 12 unusable pictures") in result.stderr
    assert "Traceback" not in result.stderr
    if code:
        return
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["dropped_items"] == len(REFUSED)
    assert len(list(data.iterdir())) == 2 * (40 + len(REFUSED))


def test_two_processes_end_together_on_unusable_data_with_one_line(work, tmp_path):
    data = bad_data(tmp_path / "data", 40)
    result = launching.deepspeed(2, ENCODE, "--image_tokenizer", work / "tokenizer/model", "--data.path", data, "--out",
                                 tmp_path / "tokens")
    assert result.returncode == 4, result.stderr[-2000:]
    assert result.stderr.count("encode_dataset.py: error: ") == 1
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "tokens").exists()


def test_items_that_are_unusable_when_the_data_is_opened_count_too(work, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(50):
        Image.new("RGB", (20, 20), (number, 80, 120)).save(data / f"{number}.png")
        if number < 30:
            (data / f"{number}.txt").write_text(f"picture {number}")
    result = launching.python(TOKENIZER, "--config", "debug_tokenizer.yaml", "--data.path", data, "--run_dir", tmp_path / "r")
    assert result.returncode == 4, result.stderr[-2000:]
    assert "no caption file" in result.stderr


ONE_LINE = [
    ("typo", [TOKENIZER, "--train.stesp", "3"], 2, "did you mean 'train.steps'"),
    ("no data", [TOKENIZER, "--config", "debug_tokenizer.yaml", "--data.path", "{tmp}/nowhere", "--run_dir", "{tmp}/r"], 2,
     "nowhere"),
    ("empty data", [TOKENIZER, "--config", "debug_tokenizer.yaml", "--data.path", "{tmp}", "--run_dir", "{tmp}/r"], 4, "{tmp}"),
    ("validation split", [SEQ2SEQ, "--config", "debug_seq2seq.yaml", "--data.path", "{work}/tokens", "--image_tokenizer",
                          "{work}/tokenizer/model", "--run_dir", "{tmp}/r", "--data.validation_split", "trian"], 2,
     "did you mean 'train'"),
    ("run in a file", [TOKENIZER, "--config", "debug_tokenizer.yaml", "--data.path", "{work}/data", "--run_dir",
                       "{work}/tokens/tokens.json"], 2, "tokens.json"),
    ("another model", [TOKENIZER, "--config", "{work}/alone/config.yaml", "--model.channels", "24"], 3,
     "model.channels 16 then, 24 now"),
    ("guidance", [SEQ2SEQ, "--config", "debug_seq2seq.yaml", "--data.path", "{work}/tokens", "--image_tokenizer",
                  "{work}/tokenizer/model", "--run_dir", "{tmp}/r", "--sample_guidance", "200"], 2, "sample_guidance"),
    ("lpips weights", [TOKENIZER, "--config", "debug_tokenizer.yaml", "--data.path", "{work}/data", "--run_dir", "{tmp}/r",
                       "--loss.perceptual_weight", "1", "--loss.perceptual_path", "{tmp}/none"], 2,
     "no such LPIPS weights file"),
    ("batch", [TOKENIZER, "--config", "debug_tokenizer.yaml", "--data.path", "{work}/data", "--run_dir", "{tmp}/r",
               "--train.accumulation", "3"], 2, "not divisible"),
    ("no tokenizer", [ENCODE, "--image_tokenizer", "{tmp}", "--data.path", "{work}/data", "--out", "{tmp}/t"], 2,
     "config.json is missing"),
    ("someone's folder", [ENCODE, "--image_tokenizer", "{work}/tokenizer/model", "--data.path", "{work}/data", "--out",
                          "{work}/data"], 2, "holds other files"),
    ("no tokens", [SEQ2SEQ, "--data.path", "{tmp}/nowhere", "--image_tokenizer", "{work}/tokenizer/model", "--run_dir",
                   "{tmp}/r"], 2, "no such folder of token shards"),
    ("resume", [SEQ2SEQ, "--config", "debug_seq2seq.yaml", "--data.path", "{work}/tokens", "--image_tokenizer",
                "{work}/tokenizer/model", "--run_dir", "{tmp}/r", "--checkpoint.resume", "required"], 3, "no checkpoint"),
]


@pytest.mark.parametrize(("arguments", "code", "words"), [case[1:] for case in ONE_LINE], ids=[case[0] for case in ONE_LINE])
def test_mistakes_end_in_one_line_and_the_right_code(work, tmp_path, arguments, code, words):
    before = sorted(str(p) for p in work.rglob("*"))
    filled = [a.format(tmp=tmp_path, work=work) for a in arguments]
    result = launching.python(*filled)
    assert result.returncode == code, result.stderr
    assert words.format(tmp=tmp_path) in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(str(p) for p in work.rglob("*")) == before


def test_the_launcher_passes_on_the_exit_code(tmp_path):
    result = launching.deepspeed(1, TOKENIZER, "--train.stesp", "3")
    assert result.returncode == 2
    assert "did you mean 'train.steps'" in result.stderr
