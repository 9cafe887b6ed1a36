"""`tokenloom estimate --config`: a training's memory, steps, arithmetic, hours and disk; what it assumes; what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tokenloom
from benchmarks.scaling_table import HEADER, PROCESSES, SIZES, rows_of_size
from seq2seq import Seq2SeqConfig
from tests import launching, tiny
from training.config.transformer import read_settings
from training.engine.gpus import training_flops
from training.planning.flops import forward_flops, tokenizer_training_flops
from training.planning.rank_memory import checkpoint_bytes

GB = 10**9
GPUS = ("--gpus", 8, "--gpu", "H100")
DEBUG = ("--config", "small_seq2seq", "--model.preset", "debug", "--train.batch_size", 512, *GPUS)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    tiny.token_shards(folder, 12)
    return folder


def values(run, *arguments: object) -> dict:
    code, out, err = run(*arguments, "--json")
    assert (code, err) == (0, [])
    return json.loads(out)


def small(**derived) -> Seq2SeqConfig:
    return read_settings({"preset": "small"}).build({
        "text_vocab_size": 4000, "text_length": 32, "codebook_size": 16_384, "grid": (16, 16), **derived})


@pytest.mark.long
def test_a_shipped_recipe_needs_no_files(run):
    """parameters: counted by hand of the same preset; memory: 2 bytes of weight, 12 of state over 8 processes at stage 1."""
    found = values(run, "--config", "small_seq2seq", *GPUS)
    with torch.device("meta"):
        count = sum(p.numel() for p in tokenloom.EncoderDecoder(small()).parameters())
    assert found["parameters"]["trainable"] == count == 88_169_972
    assert (found["kind"], found["processes"], found["device"], found["precision"]) == ("seq2seq", 8, "H100", "bfloat16")
    assert (found["micro_batch"], found["steps"], found["pictures"], found["tokens"]) == (8, 20_000, 1_280_000, 327_680_000)
    stage = found["stages"][1]
    assert stage["bytes"]["parameters"] == 2 * count
    assert stage["bytes"]["optimizer"] == pytest.approx(12 * count / 8, rel=1e-6)
    assert stage["bytes"]["total"] == sum(bytes for part, bytes in stage["bytes"].items() if part != "total")
    assert found["memory"] == 80 * GB and stage["fits"] is True
    assert found["calculated"] is True
    assert found["assumed"] == ["grid 16x16 (--grid)", "codebook size 16384 (--codebook-size)"]


@pytest.mark.long
def test_time_is_arithmetic_at_the_utilisation(run):
    found = values(run, "--config", "small_seq2seq", *GPUS, "--mfu", 0.25)
    assert found["flops"]["picture"] == training_flops(forward_flops(small()))
    assert found["flops"]["run"] == found["flops"]["picture"] * 1_280_000
    assert found["hours"] == pytest.approx(found["flops"]["run"] / (0.25 * 989e12 * 8) / 3600)
    assert values(run, "--config", "small_seq2seq", *GPUS)["hours"] == pytest.approx(found["hours"] * 0.25 / 0.4)


@pytest.mark.long
def test_what_files_say_is_read_from_them(run, made):
    found = values(run, "--config", "debug_seq2seq", "--data.path", made / "tokens", "--image_tokenizer", made / "tokenizer",
                   "--train.steps", 30, "--train.batch_size", 4, "--memory", "8GiB")
    assert (found["rows"], found["epochs"], found["tokens"]) == (12, 10.0, 30 * 4 * 16)
    assert not [sentence for sentence in found["assumed"] if "grid" in sentence or "codebook" in sentence]
    assert found["stages"][0]["bytes"]["other_models"] > 0  # the image tokenizer's
    assert found["disk"]["token_shards"] == 12 * 16 * 2


@pytest.mark.long
def test_each_text_input_has_its_sizes(run, made, tmp_path, capsys):
    tiny.bert_folder(tmp_path / "bert")
    capsys.readouterr()
    base = ("--config", "debug_seq2seq", "--image_tokenizer", made / "tokenizer", "--gpu", "L4")
    frozen = values(run, *base, "--text.kind", "frozen", "--text.encoder", tmp_path / "bert", "--text.text_length", 8)
    assert not [sentence for sentence in frozen["assumed"] if "width" in sentence]  # BERT's config says 16
    assert "frozen text encoder" in frozen["not_counted"][0]
    wider = values(run, *base, "--text.kind", "frozen", "--text.encoder", "somewhere/else", "--text.text_length", 8,
                   "--feature-width", 24)
    assert wider["parameters"]["trainable"] - frozen["parameters"]["trainable"] == (24 - 16) * 64
    classes = values(run, *base, "--text.kind", "classes", "--vocab-size", 1001)
    assert "vocab size 1001 (--vocab-size)" in classes["assumed"] and classes["not_counted"] == []


@pytest.mark.long
def test_pictures_are_counted_where_they_are_encoded_on_the_fly(run, made, tmp_path):
    for number, picture in enumerate(tiny.pictures(5)):
        picture.save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a picture")
    found = values(run, "--config", "debug_seq2seq", "--image_tokenizer", made / "tokenizer", "--data.path", tmp_path,
                   "--data.on_the_fly", "true", "--gpu", "L4")
    assert found["rows"] == 5 and found["disk"]["token_shards"] == 0
    assert values(run, "--config", "debug_tokenizer", "--data.path", tmp_path, "--gpu", "L4")["rows"] == 5


@pytest.mark.long
def test_disk_is_what_a_run_keeps(run):
    found = values(run, "--config", "small_seq2seq", *GPUS, "--checkpoint.keep_last", 4, "--checkpoint.keep_every_steps", 5000)
    count = found["parameters"]["trainable"]
    each = 2 * count + 4 * count + 8 * count  # bfloat16 weights, float32 copies, two moments
    assert found["disk"]["checkpoint"] == pytest.approx(each, rel=0.001)
    assert found["disk"]["checkpoints"] == 4 + 1 + 4
    assert found["disk"]["total"] == found["disk"]["checkpoint"] * 9 + found["disk"]["export"]


@pytest.mark.long
def test_the_configs_settings_change_the_estimate(run):
    def total(*changes: object) -> int:
        return values(run, *DEBUG, *changes)["stages"][1]["bytes"]["total"]

    plain, count = total(), values(run, *DEBUG)["parameters"]["trainable"]
    assert total("--train.gradient_checkpointing", "true") < plain
    assert total("--train.accumulation", 4) < plain
    assert total("--train.batch_size", 1024) > plain
    assert total("--train.precision", "float32") > plain
    assert total("--train.weight_ema", 0.99) == plain + 4 * count
    assert total("--deepspeed.offload", "optimizer") < plain
    assert total("--gpus", 16) < plain


@pytest.mark.long
def test_an_image_tokenizers_training_is_told_by_its_keys(run):
    found = values(run, "--config", "vqgan_f16_1024_tokenizer", "--gpu", "A100", "--rows", 50_000)
    assert found["kind"] == "tokenizer" and found["rows"] == 50_000
    assert [stage["possible"] for stage in found["stages"]] == [True, True, True, False]
    assert found["flops"]["picture"] > 3 * 391_311_785_984  # with discriminator and perceptual network
    assert found["stages"][0]["bytes"]["other_models"] > 14 << 20  # VGG16's convolutions


@pytest.mark.long
def test_a_tokenizers_arithmetic_is_that_of_its_step():
    from training.config.tokenizer import TokenizerRunConfig

    def flops(**changes) -> int:
        return tokenizer_training_flops(TokenizerRunConfig.parse(
            {"run_dir": "-", "data": {"path": "-"}, "model": {"preset": "debug"}, **changes}, "test"))

    plain = flops()
    # the first convolution's pictures need no gradient, and looking codes up has none
    assert 0.9 < plain / (3 * 33_341_440) < 1
    adversarial = flops(adversarial={"weight": 0.5, "discriminator": {"layers": 1}})
    assert adversarial > plain
    assert flops(train={"gradient_checkpointing": True}) == plain  # what is computed again does not count


def test_a_matchers_training_is_told_by_its_name(run):
    found = values(run, "--config", "emoji_matcher", "--gpu", "A100")
    assert found["kind"] == "matcher" and found["tokens"] == 0


@pytest.mark.long
def test_a_config_that_could_be_several_needs_a_kind(run, tmp_path):
    (tmp_path / "mine.yaml").write_text("train:\n  steps: 10\n")
    code, out, err = run("--config", tmp_path / "mine.yaml")
    assert (code, out) == (2, "")
    assert err[0].endswith("could be of seq2seq or tokenizer or matcher; say which with --kind")
    assert values(run, "--config", tmp_path / "mine.yaml", "--kind", "tokenizer")["kind"] == "tokenizer"


@pytest.mark.long
def test_advice_names_what_to_change(run):
    whole = values(run, *DEBUG)["stages"][1]["bytes"]["total"]
    narrow = values(run, *DEBUG, "--memory", f"{whole - (1 << 20)}B")["advice"]
    assert narrow.startswith("does not fit: ") and "it would fit with train.accumulation 2" in narrow
    assert "refuse" not in narrow
    assert "the run would refuse to start" in values(run, *DEBUG, "--memory", "500MiB")["advice"]
    assert values(run, "--config", "small_seq2seq", *GPUS)["advice"].startswith("fits; deepspeed.zero_stage 0 would too")
    assert values(run, "--config", "small_seq2seq", *GPUS, "--deepspeed.zero_stage", 0)["advice"] == "fits"


@pytest.mark.long
def test_the_table_for_people(run):
    code, out, err = run("--config", "small_seq2seq", *GPUS, "--rows", 64_000)
    assert (code, err) == (0, [])
    lines = out.splitlines()
    assert lines[0].startswith("seq2seq: 88,169,972 parameters; 8 x H100, bfloat16, batch 64 (8 a process")
    parts = {line[:34].strip(): line[34:].split() for line in lines if len(line) > 40}
    assert len(parts["total"]) == 4 and float(parts["total"][1].replace(",", "")) > 1000
    assert parts["largest in"] == ["backward"] * 4
    assert any("20.0 epochs of 64,000 rows" in line for line in lines)
    assert any(line.startswith("time: ") and "MFU 0.4 of 989 TFLOP/s" in line for line in lines)
    assert "assumed: rows 64000 (--rows)" in lines and lines[-1].startswith("stage 1 fits")


@pytest.mark.long
def test_on_a_cpu_time_is_unknown_and_memory_is_shared(run, monkeypatch):
    monkeypatch.setattr("training.commands.estimate.available_memory", lambda device: 8 << 30)
    found = values(run, "--config", "debug_seq2seq", "--gpus", 2)
    assert (found["device"], found["precision"], found["hours"], found["memory"]) == ("cpu", "float32", None, 4 << 30)
    assert "time: unknown for this device; give --gpu" in run("--config", "debug_seq2seq")[1]


@pytest.mark.parametrize(("arguments", "words"), [
    (["--config", "nothing.yaml"], "--config nothing.yaml: no such file"),
    (["--config", "small_seq2seq", "--model.preset", "parti-4b"], "unknown model.preset 'parti-4b'; did you mean"),
    (["--config", "small_seq2seq", "--gpus", "0"], "--gpus 0: expected 1 to 65,536"),
    (["--config", "small_seq2seq", "--gpus", "many"], "--gpus: invalid int value: 'many'"),
    (["--config", "small_seq2seq", "--gpus", "7"], "train.batch_size 64 is not divisible by 7 processes"),
    (["--config", "small_seq2seq", "--gpu", "H101"], "unknown --gpu 'H101'; did you mean 'H100'? (valid: B200, H200,"),
    (["--config", "small_seq2seq", "--gpu", "GeForce RTX 4090 Laptop GPU"], "unknown --gpu"),
    (["--config", "small_seq2seq", "--gpu", "V100", "--train.precision", "bfloat16"], "V100 does not compute in bfloat16"),
    (["--config", "small_seq2seq", "--mfu", "40"], "--mfu 40.0: expected a share above 0"),
    (["--config", "small_seq2seq", "--memory", "much"], "--memory 'much': expected a number and a unit"),
    (["--config", "small_seq2seq", "--grid", "16"], "--grid '16': expected rows x columns"),
    (["--config", "small_seq2seq", "--vocab-size", "99"], "files and config say 4000, leave it out"),
    (["--config", "emoji_matcher", "--grid", "16x16"], "--grid is not read by this run"),
    (["--config", "small_seq2seq", "--train.step", "9"], "unknown option '--train.step'; did you mean 'train.steps'?"),
    (["--config"], "--config needs a value"),
    (["--config", "small_seq2seq", "--kind", "pictures"], "argument --kind: invalid choice: 'pictures'")])
def test_bad_input_is_one_line(run, arguments, words):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert len(err) == 1 and err[0].startswith("tokenloom estimate: error: ")
    assert words in err[0]


def test_help_has_its_own_examples(run, capsys):
    with pytest.raises(SystemExit) as end:
        run("--config", "small_seq2seq", "--help")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "examples:\n  tokenloom estimate --config training/recipes/small_seq2seq.yaml" in shown and "--mfu" in shown


@pytest.mark.parametrize("recipe", sorted(path.stem for path in launching.RECIPES.glob("*.yaml")
                                          if path.stem != "vit_vqgan_decoder_tokenizer"))
@pytest.mark.slow
def test_every_recipe_is_estimated(run, recipe):
    """But the one whose model is that of the tokenizer it starts from."""
    found = values(run, "--config", recipe, "--gpu", "H100")
    assert found["kind"] == recipe.rsplit("_", 1)[1]
    assert found["stages"][found["stages"][0]["zero_stage"]]["bytes"]["total"] > 1 << 30


@pytest.mark.long
def test_a_checkpoint_has_the_files_of_all_processes():
    from training.config.seq2seq import Seq2SeqRunConfig
    from training.planning.plan import plan_of

    config = Seq2SeqRunConfig.parse({"run_dir": "-", "data": {"path": "-"}, "image_tokenizer": "-"}, "test")
    plan = plan_of(config, "float32", model=small())
    count = plan.parameters
    assert [checkpoint_bytes(plan, stage) for stage in (0, 1, 3)] == [12 * count, 16 * count, 12 * count]


# ---- docs/scaling.md ----

def rows_of_the_page() -> list[str]:
    page = (launching.REPOSITORY / "docs/scaling.md").read_text(encoding="utf-8")
    assert HEADER in page
    assert "**Calculated, not measured**" in page.split("## Parti's sizes")[1].split(HEADER)[0]
    return [line for line in page.splitlines() if line.startswith("| parti-")]


@pytest.mark.parametrize("name", [SIZES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in SIZES[1:])])
def test_the_pages_table_is_what_the_command_prints(name):
    found = rows_of_the_page()
    assert len(found) == len(SIZES) * len(PROCESSES)
    assert [line for line in found if line.startswith(f"| {name} |")] == [row.line() for row in rows_of_size(name)]


@pytest.mark.long
def test_what_the_table_says_fits_is_what_the_command_says(run):
    """The same plan through the command line."""
    row = rows_of_size(SIZES[0])[2]
    found = values(run, "--config", "small_seq2seq", "--model.preset", SIZES[0], "--model.dropout", 0,
                   "--train.batch_size", 8192, "--train.steps", 450_000, "--train.sample_every", 0,
                   "--deepspeed.zero_stage", row.change.stage, "--train.accumulation", row.change.accumulation,
                   "--grid", "32x32", "--codebook-size", 8192, "--text.vocab_size", 16_000, "--text.text_length", 128,
                   "--gpus", 256, "--gpu", "H100")
    assert found["stages"][row.change.stage]["bytes"]["total"] == row.total < found["memory"] == 80 * GB
    assert found["hours"] == pytest.approx(row.hours)
