"""A tokenizer without an encoder (min-dalle publishes one): pictures come out of it, and all that needs codes of pictures is
refused in one line before it begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tokenloom
from inference import TextToImage
from tests import tiny
from tokenizer_image import VQGAN, VQGANConfig
from tokenizer_image.fingerprint import code_fingerprint
from tokenloom_common.errors import UserError
from training.config.encoding import EncodeRunConfig
from training.config.seq2seq import Seq2SeqRunConfig
from training.config.tokenizer import TokenizerRunConfig
from training.encode_dataset import DatasetEncoder
from training.engine.processes import Processes
from training.train_seq2seq import Seq2SeqTraining
from training.warm_start.tokenizer import take_tokenizer

NO_ENCODER = r"has no encoder \(has_encoder is false in its config\).*convert the whole VQGAN"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """`model`, a model folder whose image tokenizer only decodes; `whole`, the same one without; `data`, four pictures."""
    folder = tmp_path_factory.mktemp("made")
    tiny.model_folder(folder / "whole")
    tiny.model_folder(folder / "model")
    whole = tiny.vqgan()
    half = VQGAN(VQGANConfig.parse({**whole.config.plain(), "has_encoder": False}, "test"))
    half.load_state_dict({name: tensor for name, tensor in whole.state_dict().items() if name in half.state_dict()})
    half.eval().save_pretrained(folder / "model/tokenizer_image")
    config = folder / "model/seq2seq/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tokenizer_fingerprint": code_fingerprint(half)}))
    (folder / "data/train").mkdir(parents=True)
    for row, picture in enumerate(tiny.pictures(4)):
        picture.save(folder / f"data/train/{row}.png")
        (folder / f"data/train/{row}.txt").write_text(tiny.CAPTIONS[row])
    return folder


def test_generating_needs_no_encoder(made):
    pictures = [TextToImage.from_pretrained(made / name).generate(["a red heart"], seed=3).images[0].tobytes()
                for name in ("model", "whole")]
    assert pictures[0] == pictures[1]


@pytest.mark.long
def test_info_and_estimate_take_it(made, capsys):
    assert tokenloom.main(["info", str(made / "model"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["image_tokenizer"]
    assert found["has_encoder"] is False
    assert found["parameters"] < sum(p.numel() for p in tiny.vqgan().parameters())
    assert tokenloom.main(["estimate", str(made / "model"), "--json"]) == 0


@pytest.mark.parametrize("words", [
    ["reconstruct", "{made}/data/train/0.png", "--model", "{made}/model", "--out", "{out}"],
    ["evaluate", "tokenizer", "--model", "{made}/model", "--data", "{made}/data", "--out", "{out}", "--lpips", "none",
     "--features", "none"],
    ["evaluate", "generator", "--model", "{made}/model", "--data", "{made}/data", "--out", "{out}", "--features", "none"],
    ["estimate", "--config", "small_seq2seq", "--image_tokenizer", "{made}/model/tokenizer_image", "--data.path",
     "{made}/data", "--data.on_the_fly", "true", "--gpu", "L4"]], ids=lambda words: "-".join(words[:2]))
def test_commands_that_encode_refuse_it_in_one_line(made, tmp_path, capsys, words):
    code = tokenloom.main([word.format(made=made, out=tmp_path / "out") for word in words])
    shown = capsys.readouterr()
    assert (code, shown.out, shown.err.count("\n")) == (2, "", 1)
    assert f"{made}/model" in shown.err
    assert "has no encoder" in shown.err
    assert not (tmp_path / "out").exists()


def test_trainings_that_encode_refuse_it_in_one_line(made, tmp_path, group: Processes):
    tokenizer, data = str(made / "model/tokenizer_image"), {"path": str(made / "data")}
    encode = EncodeRunConfig.parse({"image_tokenizer": tokenizer, "data": data, "out": str(tmp_path / "out")}, "test")
    with pytest.raises(UserError, match=f"^{tokenizer} {NO_ENCODER}"):
        DatasetEncoder(encode, group)
    run = Seq2SeqRunConfig.parse({
        "image_tokenizer": tokenizer, "run_dir": str(tmp_path / "run"), "data": {**data, "on_the_fly": True},
        "model": {"preset": "debug"}, "train": {"steps": 1, "batch_size": 4, "precision": "float32"}}, "test")
    with pytest.raises(UserError, match=f"^{tokenizer} {NO_ENCODER}"):
        Seq2SeqTraining(run, group)
    base = {"data": data, "run_dir": str(tmp_path / "run"), "train": {"steps": 1}, "init_from": tokenizer}
    with pytest.raises(UserError, match=f"{tokenizer} {NO_ENCODER}"):
        TokenizerRunConfig.parse(base, "test")
    with pytest.raises(UserError, match=f"model {NO_ENCODER}"):
        TokenizerRunConfig.parse({**base, "init_from": None, "model": {"preset": "debug", "has_encoder": False}}, "test")
    with pytest.raises(UserError, match=f"^init_from {tokenizer} {NO_ENCODER}"):
        take_tokenizer(tiny.vqgan(), tokenizer, decoder_only=False, run_dir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
