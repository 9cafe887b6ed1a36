"""Configs: defaults < recipe < command line, every key known, every mistake one line."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import torch

from seq2seq import TRANSFORMER_KINDS
from tests import tiny
from tokenizer_image import IMAGE_TOKENIZERS, preset
from tokenloom_common.config import dotted_names, sections
from tokenloom_common.errors import UserError
from training.config.encoding import EncodeRunConfig
from training.config.loading import dump_config, load_config
from training.config.matcher import MatcherRunConfig
from training.config.seq2seq import Seq2SeqRunConfig
from training.config.tokenizer import TokenizerRunConfig

REPOSITORY = Path(__file__).parents[1]
RECIPES = sorted((REPOSITORY / "training" / "recipes").glob("*.yaml"))
NEEDED = ["--data.path", "d", "--run_dir", "r"]


def load(*argv: str, kind=TokenizerRunConfig):
    return load_config(kind, argv, "train.py", "text")


def test_defaults_then_recipe_then_command_line(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train: {steps: 7, batch_size: 64}\ndata: {path: here}\n")
    config = load("--config", str(recipe), "--train.steps", "9", "--run_dir", "r", "--optim.betas", "[0.5, 0.6]")
    assert (config.train.steps, config.train.batch_size, config.train.log_every) == (9, 64, 10)
    assert config.data.path == "here"
    assert config.optim.betas == (0.5, 0.6)


def test_the_launchers_rank_flag_and_equals_signs_are_accepted():
    assert load("--local_rank=3", *NEEDED, "--train.steps=5").train.steps == 5
    assert load("--local_rank", "3", *NEEDED).train.steps == 1000


@pytest.mark.parametrize(("argv", "words"), [
    (["--train.stesp", "5"], "did you mean 'train.steps'"), (["--optm.lr", "5"], "did you mean 'optim.lr'"),
    (["--train.steps", "many"], "train.steps"), (["--train.steps", "0"], "train.steps"), (["--train.steps"], "needs a value"),
    (["stray"], "unexpected argument 'stray'"), (["--optim.lr", "-1"], "optim.lr"), (["--optim.lr", ".nan"], "optim.lr"),
    (["--config", "nowhere.yaml"], "no such file"), (["--deepspeed.zero_stage", "4"], "zero_stage"),
    (["--model.resolution", "30"], "resolution"), (["--seed", "[1, 2"], "--seed"), (["--checkpoint.resume", "maybe"], "resume"),
])
def test_wrong_options_are_one_line(argv, words):
    with pytest.raises(UserError, match=words) as caught:
        load(*NEEDED, *argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "words"), [
    ("train: {stpes: 3}", "unknown key 'train.stpes'; did you mean 'train.steps'"), ("- a\n- b", "expected a mapping"),
    ("a: [1", "cannot be read"), ("\x00", "cannot be read"), ("train: 3", "train"), ("batch: 3", "unknown key 'batch'")])
def test_wrong_recipes_are_one_line_that_names_key_or_file(tmp_path, text, words):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        load(*NEEDED, "--config", str(tmp_path / "r.yaml"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["null", "vqgann", "3"])
def test_a_kind_that_is_none_is_refused(value):
    with pytest.raises(UserError, match=f"unknown model.kind '{value}'"):
        load(*NEEDED, "--model.kind", value)


def test_a_missing_required_key_is_named():
    with pytest.raises(UserError, match=r"missing key 'run_dir'"):
        load("--data.path", "d")


def test_a_recipe_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load(*NEEDED, "--config", str(tmp_path / "r.yaml"))


def test_the_merged_config_reads_back_as_itself(tmp_path):
    config = load(*NEEDED, "--train.steps", "5", "--loss.l2_weight", "0.5")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load("--config", str(tmp_path / "config.yaml")) == config


def test_help_lists_every_key(capsys):
    for kind in (TokenizerRunConfig, EncodeRunConfig, MatcherRunConfig, Seq2SeqRunConfig):
        with pytest.raises(SystemExit) as stopped:
            load("--help", kind=kind)
        assert stopped.value.code == 0
        shown = capsys.readouterr().out
        assert "--data.path" in shown
        assert "required" in shown
    assert "--optim.gradient_clipping" in shown
    assert "--caption_dropout" in shown


@pytest.mark.long
@pytest.mark.parametrize("kind", [TokenizerRunConfig, EncodeRunConfig, Seq2SeqRunConfig, MatcherRunConfig])
def test_the_name_of_every_option_is_read_in_code(kind):
    sources = [p for folder in ("training", "inference", "seq2seq", "tokenizer_image")
               for p in (REPOSITORY / folder).rglob("*.py") if p != REPOSITORY / "training" / "config.py"]
    read = {node.attr for p in sources for node in ast.walk(ast.parse(p.read_text())) if isinstance(node, ast.Attribute)}
    leaves = {name.rsplit(".", 1)[-1] for name in dotted_names(kind)}
    passed_on_whole = {"preset", "kind"}  # resolved in config.py itself
    assert leaves - read - passed_on_whole == set()


SHAPE_CHANGES = {"text_vocab_size": 321, "text_length": 13, "codebook_size": 33, "grid": (4, 5), "width": 40, "heads": 4,
                 "head_dim": 20, "kv_heads": 1, "encoder_layers": 3, "decoder_layers": 3, "feedforward": "gelu",
                 "feedforward_multiplier": 2.0, "norm": "layernorm", "qk_norm": False, "learned_positions": False, "layers": 2,
                 "norm_placement": "sandwich", "embedding_norm": True, "attention_bias": True, "feedforward_bias": False,
                 "norm_eps": 1e-5, "image_positions": "flat", "predict_text": True, "text_padding": "learned",
                 "begin_of_image": False}
SHAPE_CHANGES_TOGETHER = {"norm_bias": {"norm": "layernorm", "norm_bias": True},
                          "text_feature_width": {"text_vocab_size": None, "text_feature_width": 6},
                          **{name: {"layout_kind": "colors", "layout_classes": 27, "layout_grid": (2, 2)}
                             for name in ("layout_kind", "layout_classes", "layout_grid")}}
OUTPUT_CHANGES = {"rotary": "1d", "dropout": 0.5, "attention": ("row",), "last_attention": "column", "text_positions": "blind"}
FIELDS = [(family, field) for family in (tiny.seq2seq, tiny.decoder_only) for field in family().config_class.model_fields]


@pytest.mark.parametrize(("family", "field"), FIELDS)
def test_every_field_of_the_transformer_changes_it(family, field):
    base = family()
    if field == "tokenizer_fingerprint":  # changes what it may be paired with: test_pipeline
        return
    if field == "text_projection":
        shared = SHAPE_CHANGES_TOGETHER["text_feature_width"]
        shapes = [len(family(**shared, text_projection=kind).state_dict()) for kind in ("linear", "mlp")]
        assert shapes[0] != shapes[1]
        return
    if field in SHAPE_CHANGES or field in SHAPE_CHANGES_TOGETHER:
        changed = family(**SHAPE_CHANGES_TOGETHER.get(field, {field: SHAPE_CHANGES.get(field)}))
        shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in (base, changed)]
        assert shapes[0] != shapes[1]
        return
    if field == "convolution_size":
        base = family(attention=("convolution",), convolution_size=3)
        changed = family(attention=("convolution",), convolution_size=5)
    else:
        changed = family(**{field: OUTPUT_CHANGES[field]})
    changed.load_state_dict(base.state_dict())
    text = tiny.text_tokenizer().encode(["a red heart"])
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        assert not torch.allclose(base.train()(*text, tokens).image, changed.train()(*text, tokens).image, atol=1e-4)


def test_there_are_recipes():
    assert len(RECIPES) == 26


@pytest.mark.parametrize(("flag", "text"), [("--data.path", "20261121"), ("--run_dir", "runs/try #2"), ("--run_dir", "null: x"),
                                            ("--data.path", "{000..012}.tar"), ("--run_dir", "[a"), ("--data.split", "yes")])
def test_text_is_taken_as_it_stands(flag, text):
    config = load(*NEEDED, flag, text)
    section, _, name = flag.removeprefix("--").rpartition(".")
    assert getattr(getattr(config, section) if section else config, name) == text


def test_recipes_named_in_help_and_docs_exist():
    names = {name for page in [REPOSITORY / "tokenloom.py", REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md"),
                               *(REPOSITORY / "training").glob("*.py")]
             for name in re.findall(r"\b(\w+_(?:tokenizer|seq2seq|matcher)\.yaml)", page.read_text())}
    assert names <= {recipe.name for recipe in RECIPES}
    assert names


RECIPE_KINDS = {"tokenizer": TokenizerRunConfig, "seq2seq": Seq2SeqRunConfig, "matcher": MatcherRunConfig}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_every_recipe_parses(recipe, tmp_path):
    text = recipe.read_text()
    assert all(word in text for word in ("# command:", "# machine:", recipe.name))
    kind = RECIPE_KINDS[recipe.stem.rsplit("_", 1)[-1]]
    extra = [*NEEDED, "--image_tokenizer", "t"] if kind is Seq2SeqRunConfig else NEEDED
    if "init_from" in text:  # the model is the one that is started from
        if kind is Seq2SeqRunConfig:
            tiny.model_folder(tmp_path)
        else:
            (tmp_path / "config.json").write_text(json.dumps(preset("vit-vqgan-s").plain()))
        extra = [*extra, "--init_from", str(tmp_path)]
    config = load("--config", str(recipe), *extra, kind=kind)
    assert config.train.batch_size % 2 == 0


@pytest.mark.parametrize(("run_config", "kinds"), [
    (TokenizerRunConfig, IMAGE_TOKENIZERS), (Seq2SeqRunConfig, TRANSFORMER_KINDS)])
def test_every_family_can_be_named_in_a_recipe(run_config, kinds):
    families = sections(run_config.model_fields["model"].annotation)
    assert {family.model_fields["kind"].default for family in families} == set(kinds)
