"""`init_from`: a run begins as the model that it names, goes on without it, and says in one line what does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from inference import SamplingParams, save_model_folder
from inference.model_folder import LoadedModel, load_model_folder
from seq2seq import TEXT_SOURCES, ClassLabels, ClassLabelsConfig, FrozenTextEncoder, TextSource
from tests import launching, test_bpe_tokenizer, tiny
from tokenizer_image import load_tokenizer
from tokenizer_image.fingerprint import code_fingerprint
from tokenloom_common.errors import ResumeError, UserError, run_command
from training.config.loading import load_config
from training.config.seq2seq import Seq2SeqRunConfig
from training.config.text import TextConfig
from training.config.tokenizer import TokenizerRunConfig
from training.data.builders.shapes import build_shapes
from training.data.text_input import choose_text_source
from training.data.visits.order import MicroBatches
from training.data.visits.tokens import TokenRows
from training.engine.processes import Processes
from training.loop.loop import run_training
from training.runs.metrics import read_metrics
from training.train_seq2seq import Seq2SeqTraining
from training.train_tokenizer import TokenizerTraining
from training.warm_start.transformer import open_start

ONE_STEP = ("--train.steps", 1, "--train.batch_size", 6, "--train.log_every", 1, "--train.sample_every", 0,
            "--checkpoint.every_steps", 0, "--optim.warmup_steps", 0)


# ---- helpers for any model folder ----

def recipe(data: Path, run_dir: Path, *more: object) -> Seq2SeqRunConfig:
    """One step on token shards with nothing random in it, from a command line."""
    argv = ["--data.path", data, "--run_dir", run_dir, "--caption_dropout", 0, *ONE_STEP, *more]
    return load_config(Seq2SeqRunConfig, [str(word) for word in argv], "train", "")


def train(run: Seq2SeqRunConfig, group: Processes) -> Seq2SeqTraining:
    training = Seq2SeqTraining(run, group)
    run_training(training.task(), run, group, training.run_state)
    return training


def first_rows(training: Seq2SeqTraining) -> TokenRows:
    """Captions and image tokens of a run's first step."""
    run = training.config.train
    return training.visits.__getitems__(next(iter(MicroBatches(training.order, run.batch_size, 1, 0, 1, 0, run.steps))))


def first_loss(folder: Path | None, data: Path, run_dir: Path, group: Processes, *more: object) -> tuple[float, TokenRows]:
    """The first loss of the image tokens that a run from `folder` logs, and what it was of."""
    start = [] if folder is None else ["--init_from", folder]
    training = train(recipe(data, run_dir, *start, *more), group)
    row = read_metrics(run_dir / "metrics.jsonl")[0]
    return row.get("image", row["loss"]), first_rows(training)  # a loss of several parts is logged with each of them


@torch.inference_mode()
def evaluation_loss(model: LoadedModel, rows: TokenRows) -> float:
    """What a loaded model folder says of the same rows: mean cross entropy of the image tokens in nats."""
    tokens = torch.from_numpy(rows.image_tokens.astype("int64"))
    logits = model.seq2seq(*model.text_tokenizer.encode(rows.captions), tokens).image
    return float(F.cross_entropy(logits.transpose(1, 2), tokens))


# ---- tiny sources ----

def store_as(folder: Path, dtype: torch.dtype) -> Path:
    """The weights of a model folder's transformer in another precision."""
    path = folder / "seq2seq/model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    return folder


def save(folder: Path, text: TextSource, family: Callable[..., Any] = tiny.decoder_only, **changes: Any) -> Path:
    tokenizer = tiny.vqgan()
    read = {"text_vocab_size": text.vocab_size, "text_feature_width": text.feature_width,
            "text_length": text.config.text_length}
    model = family(**read, tokenizer_fingerprint=code_fingerprint(tokenizer), **changes)
    return save_model_folder(folder, tokenizer, model, text, SamplingParams(), "# tiny\n")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Token shards of an image tokenizer, and model folders with that tokenizer."""
    folder = tmp_path_factory.mktemp("made")
    tiny.token_shards(folder)
    tiny.model_folder(folder / "encoder_decoder")
    save(folder / "decoder_only", tiny.text_tokenizer())
    save(folder / "predicts_text", tiny.text_tokenizer(), predict_text=True, text_padding="learned", begin_of_image=False)
    store_as(tiny.model_folder(folder / "float16"), torch.float16)
    tiny.vqgan(codebook_size=64).save_pretrained(folder / "64_codes")
    tiny.vqgan(seed=1).save_pretrained(folder / "other_codes")
    tiny.vqgan().save_pretrained(folder / "8x8")
    config = json.loads((folder / "8x8/config.json").read_text())
    (folder / "8x8/config.json").write_text(json.dumps({**config, "resolution": 32}))
    return folder


PLAIN = ("--use_layout", "false")


# ---- the transformer ----

@pytest.mark.long
@pytest.mark.parametrize("name", ["encoder_decoder", "decoder_only", "predicts_text", "float16"])
def test_the_first_loss_is_the_sources_evaluation_loss(made, tmp_path, group, name):
    parts = ("--loss.image_weight", 0.875, "--loss.text_weight", 0.125) if name == "predicts_text" else ()
    loss, rows = first_loss(made / name, made / "tokens", tmp_path / "run", group, *PLAIN, *parts)
    assert loss == pytest.approx(evaluation_loss(load_model_folder(made / name), rows), abs=1e-5)


@pytest.mark.long
def test_without_init_from_the_first_loss_is_another(made, tmp_path, group):
    loss, rows = first_loss(None, made / "tokens", tmp_path / "run", group, *PLAIN, "--image_tokenizer", made / "tokenizer",
                            "--model.preset", "debug-decoder")
    others = [evaluation_loss(load_model_folder(made / name), rows) for name in ("encoder_decoder", "decoder_only")]
    assert all(abs(loss - other) > 0.05 for other in others)


@pytest.mark.long
def test_sharded_weights_and_the_average_begin_with_the_sources(made, tmp_path, group):
    expected = {name: tensor.float() for name, tensor in load_file(made / "float16/seq2seq/model.safetensors").items()}
    more = (*PLAIN, "--init_from", made / "float16", "--train.gradient_checkpointing", "true", "--model.dropout", 0.1)
    for stage, average in ((1, 0.9), (3, 0)):
        run = recipe(made / "tokens", tmp_path / str(stage), *more, "--deepspeed.zero_stage", stage,
                     "--train.weight_ema", average)
        training = Seq2SeqTraining(run, group)
        states = [training.engine.full_state(), *([training.average.module.state_dict()] if training.average else [])]
        assert len(states) == 1 + bool(average)
        for state in states:
            assert all(value.dtype == torch.float32 and torch.equal(value, expected[name]) for name, value in state.items())
        assert training.model.config.dropout == 0.1  # has no weights, and is this run's


@pytest.mark.slow
def test_two_processes_begin_alike(made, tmp_path):
    script = "training/train_seq2seq.py"
    argv = ["--init_from", made / "decoder_only", "--data.path", made / "tokens", "--caption_dropout", 0, *ONE_STEP, *PLAIN,
            "--deepspeed.zero_stage", 3]
    for run, start in ((tmp_path / "one", lambda *more: launching.python(script, *more)),
                       (tmp_path / "two", lambda *more: launching.deepspeed(2, script, *more))):
        done = start(*argv, "--run_dir", run)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in ("one", "two"))
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)


@pytest.mark.long
def test_a_run_goes_on_without_the_folder_that_it_began_from(made, tmp_path, group):
    source = shutil.copytree(made / "decoder_only", tmp_path / "source")
    more = (*PLAIN, "--init_from", source, "--checkpoint.every_steps", 2, "--optim.schedule", "constant")
    whole = train(recipe(made / "tokens", tmp_path / "whole", *more, "--train.steps", 4), group)
    train(recipe(made / "tokens", tmp_path / "run", *more, "--train.steps", 2), group)
    source.rename(tmp_path / "gone")
    again = train(recipe(made / "tokens", tmp_path / "run", *more, "--train.steps", 4), group)
    states = [training.full_model().state_dict() for training in (whole, again)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    losses = [[row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("whole", "run")]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]
    with pytest.raises(ResumeError, match=r"init_from .*source then, .*decoder_only now"):  # another start is another run
        Seq2SeqTraining(recipe(made / "tokens", tmp_path / "run", *more, "--init_from", made / "decoder_only"), group)
    again.finish()
    assert code_fingerprint(load_model_folder(tmp_path / "run/model").image_tokenizer) == code_fingerprint(tiny.vqgan())
    config = load_config(Seq2SeqRunConfig, ["--config", str(tmp_path / "run/config.yaml")], "train", "")
    assert (config.init_from, config.model.plain()["layers"]) == (str(source), 3)
    facts = json.loads((tmp_path / "run/checkpoints/step-00000004/MANIFEST.json").read_text())["facts"]
    assert facts["init_from"] == str(source)
    with pytest.raises(UserError, match=r"init_from .*no such model folder"):  # a fresh run needs it
        recipe(made / "tokens", tmp_path / "run", *more, "--checkpoint.resume", "never")


def test_a_transformer_alone_takes_the_tokenizers_that_are_named(made, tmp_path, group):
    alone = ("--image_tokenizer", made / "tokenizer", "--text.tokenizer", made / "encoder_decoder/text_tokenizer")
    loss, rows = first_loss(made / "encoder_decoder/seq2seq", made / "tokens", tmp_path / "run", group, *PLAIN, *alone)
    assert loss == pytest.approx(evaluation_loss(load_model_folder(made / "encoder_decoder"), rows), abs=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["classes", "bpe", "frozen"])
def test_every_text_input_comes_with_its_model(made, tmp_path, group, kind):
    if kind == "classes":
        text: TextSource = ClassLabels(ClassLabelsConfig(classes=tuple(tiny.CAPTIONS)))
        source = save(tmp_path / "source", text)
    elif kind == "bpe":
        source = save(tmp_path / "source", test_bpe_tokenizer.source(test_bpe_tokenizer.bpe_files(tmp_path)))
    else:
        text = FrozenTextEncoder.load(str(tiny.bert_folder(tmp_path / "bert")), 8, padding="left")
        source = save(tmp_path / "source", text, tiny.seq2seq, encoder_layers=0)
    loss, rows = first_loss(source, made / "tokens", tmp_path / "run", group, *PLAIN)
    assert loss == pytest.approx(evaluation_loss(load_model_folder(source), rows), abs=1e-5)
    if kind == "classes":  # a row's first caption is its class
        assert set(rows.captions) <= set(tiny.CAPTIONS[:5])
    if kind == "frozen":
        with pytest.raises(UserError, match=r"leave text\.padding out"):
            open_start(recipe(made / "tokens", tmp_path / "run", "--init_from", source, "--text.padding", "right"))


def test_a_text_input_that_cannot_be_made_of_captions_is_named(monkeypatch):
    monkeypatch.setitem(TEXT_SOURCES, "letters", ClassLabels)
    with pytest.raises(UserError, match=r"text\.kind letters .* text\.tokenizer"):
        choose_text_source(TextConfig(kind="letters"), [], None)


WRONG: dict[str, tuple[list[object], str]] = {
    "no such folder": (["--init_from", "nowhere"], "init_from nowhere: no such model folder"),
    "no model in it": (["--init_from", "MADE/tokens"], "neither a model folder"),
    "an image tokenizer": (["--init_from", "MADE/tokenizer"], "holds kind 'vqgan', expected encoder_decoder or decoder_only"),
    "codebook": (["--image_tokenizer", "MADE/64_codes"], "codebook_size is 32 there and 64 here"),
    "grid": (["--image_tokenizer", "MADE/8x8"], "grid is (4, 4) there and (8, 8) here"),
    "fingerprint": (["--image_tokenizer", "MADE/other_codes"], "tokenizer_fingerprint is"),
    "width": (["--model.width", 64], "model.width is 32 there and 64 here; leave model.* out, or a recipe's with --model null"),
    "attention": (["--model.attention", "[row]"], "model.attention is ('full',) there and ('row',) here"),
    "preset": (["--model.preset", "debug"], "model.width is 32 there and 64 here"),
    "family": (["--model.kind", "decoder_only"], "its model.kind is encoder_decoder, this run's decoder_only"),
    "misspelt": (["--model.widht", 32], "did you mean 'model.width'"),
    "text tokenizer": (["--text.tokenizer", "MADE/encoder_decoder/text_tokenizer"], "leave text.tokenizer out"),
    "vocabulary": (["--text.vocab_size", 300], "leave text.vocab_size out"),
    "text length": (["--text.text_length", 9], "leave text.text_length out"),
    "text kind": (["--text.kind", "classes"], "its text.kind is sentencepiece, this run's classes"),
    "predicted text": (["--init_from", "MADE/predicts_text"], "loss.text_weight is 0; give the text a weight"),
    "its own tables of codes": (["--code_tables_from_codebook", "true"], "init_from brings the tables of codes"),
    "two starts": (["--text.start_from", "MADE/matcher"], "leave one of them out"),
    "layout": (["--use_layout", "true"], "layout_kind is None there and colors here"),
    "alone": (["--init_from", "MADE/encoder_decoder/seq2seq"], "name image_tokenizer and text.tokenizer"),
    "other text": (["--init_from", "MADE/encoder_decoder/seq2seq", "--image_tokenizer", "MADE/tokenizer", "--text.tokenizer",
                    "MADE/classes"], "text_vocab_size is"),
    "no weights": (["--init_from", "MADE/no_weights"], "weights are missing"),
    "other weights": (["--init_from", "MADE/other_weights"], "do not fit config.json"),
    "whole numbers": (["--init_from", "MADE/whole_numbers"], "holds int32, the model float32")}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_one_line_and_touches_nothing(made, tmp_path, group, capsys, monkeypatch, name):
    monkeypatch.delenv("TOKENLOOM_DEBUG", raising=False)
    if name == "other text":
        ClassLabels(ClassLabelsConfig(classes=("a", "b"))).save_pretrained(made / "classes")
    if name == "no weights":
        shutil.copytree(made / "encoder_decoder", made / "no_weights")
        (made / "no_weights/seq2seq/model.safetensors").unlink()
    if name == "other weights":
        shutil.copytree(made / "encoder_decoder", made / "other_weights")
        shutil.copy(made / "decoder_only/seq2seq/model.safetensors", made / "other_weights/seq2seq")
    if name == "whole numbers":
        store_as(shutil.copytree(made / "encoder_decoder", made / "whole_numbers"), torch.int32)
    arguments, words = WRONG[name]
    more = [str(word).replace("MADE", str(made)) for word in arguments]

    def start(_):
        started = ("--init_from", made / "encoder_decoder", *more)
        Seq2SeqTraining(recipe(made / "tokens", tmp_path / "run", *PLAIN, *started), group)
        return 0

    assert run_command(start, None, "train_seq2seq.py") == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("inside", ["", "model"])
def test_a_run_does_not_take_apart_the_model_that_it_begins_from(made, pictures, tmp_path, group, inside):
    for kind, run in (("encoder_decoder", recipe), ("tokenizer", tokenizer_recipe)):
        start = shutil.copytree(made / kind, tmp_path / kind / inside)
        files = sorted(start.rglob("*"))
        data = made / "tokens" if run is recipe else pictures
        asked = run(data, tmp_path / kind, "--init_from", start, *(PLAIN if run is recipe else ()))
        with pytest.raises(UserError, match=r"(lies in run_dir|is a model's folder) .*give another"):
            (Seq2SeqTraining if run is recipe else TokenizerTraining)(asked, group)
        assert sorted(start.rglob("*")) == files


def test_an_image_tokenizer_is_asked_for_where_nothing_brings_one(made, tmp_path):
    with pytest.raises(UserError, match="missing key 'image_tokenizer'"):
        recipe(made / "tokens", tmp_path / "run")


@pytest.mark.long
def test_an_estimate_reads_the_sizes_of_the_folder(run, made, tmp_path):
    text = f"init_from: {made / 'decoder_only'}\ntrain: {{batch_size: 4, steps: 30}}\n"
    (tmp_path / "finetune_seq2seq.yaml").write_text(text)
    base = ("--config", tmp_path / "finetune_seq2seq.yaml", "--memory", "8GiB")
    over = ("--config", "small_seq2seq", "--init_from", made / "decoder_only", "--model", "null", "--text", "null")
    code, out, err = run(*base, "--data.path", made / "tokens", "--use_layout", "false", "--json")
    assert (code, err) == (0, [])
    found = json.loads(out)
    assert found["parameters"]["trainable"] == sum(value.numel() for value in load_model_folder(
        made / "decoder_only").seq2seq.parameters())
    assert (found["rows"], found["assumed"]) == (12, [])
    assert found["stages"][0]["bytes"]["other_models"] > 0  # the image tokenizer's
    assert run(*base, "--grid", "4x4")[0] == 2
    assert json.loads(run(*over, "--gpu", "L4", "--json")[1])["parameters"] == found["parameters"]


# ---- image tokenizers ----

@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "shapes"
    build_shapes(folder, size=16, num_scenes=12, seed=0)
    return folder


def tokenizer_recipe(pictures: Path, run_dir: Path, *more: object) -> TokenizerRunConfig:
    argv = ["--data.path", pictures, "--run_dir", run_dir, *ONE_STEP, "--loss.l2_weight", 1, *more]
    return load_config(TokenizerRunConfig, [str(word) for word in argv], "train", "")


@pytest.mark.parametrize("folder", ["tokenizer", "encoder_decoder"])
def test_a_tokenizers_first_losses_are_the_sources_reconstruction(made, pictures, tmp_path, group, folder):
    run = tokenizer_recipe(pictures, tmp_path / "run", "--init_from", made / folder)
    training = TokenizerTraining(run, group)
    image = next(iter(training.batches(0))).image
    run_training(training.task(), run, group, training.run_state)
    source = load_tokenizer(made / "tokenizer")
    with torch.inference_mode():
        difference = source.decode_vectors(source.lookup(source.encode(image))) - image  # a loss is of what is not clamped
    row = read_metrics(tmp_path / "run/metrics.jsonl")[0]
    assert row["l1"] == pytest.approx(float(difference.abs().mean()), abs=1e-5)
    assert row["l2"] == pytest.approx(float(difference.square().mean()), abs=1e-5)


@pytest.mark.long
def test_a_tokenizers_run_goes_on_without_the_folder_that_it_began_from(made, pictures, tmp_path, group):
    source = shutil.copytree(made / "tokenizer", tmp_path / "source")
    more = ("--init_from", source, "--checkpoint.every_steps", 1, "--optim.schedule", "constant")
    states = []
    for name, steps in (("whole", (2,)), ("run", (1, 2))):
        for count in steps:
            run = tokenizer_recipe(pictures, tmp_path / name, *more, "--train.steps", count)
            training = TokenizerTraining(run, group)
            run_training(training.task(), run, group, training.run_state)
            if name == "run" and count == 1:
                source.rename(tmp_path / "gone")
        states.append(training.full_model().state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    with pytest.raises(ResumeError, match=r"init_from .*source then, .*tokenizer now"):  # another start is another run
        TokenizerTraining(tokenizer_recipe(pictures, tmp_path / "run", *more, "--init_from", made / "tokenizer"), group)
