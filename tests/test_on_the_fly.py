"""Training on captioned pictures themselves, encoded on the fly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.encoded_data import ROWS, encode, make_data
from tokenloom_common.config import merge
from tokenloom_common.errors import ResumeError, UserError
from training.config.seq2seq import Seq2SeqRunConfig
from training.data.visits.order import ItemId
from training.engine.processes import Processes
from training.loop.loop import run_training
from training.runs.metrics import read_metrics
from training.train_seq2seq import Seq2SeqTraining


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("made"))


def trained(made: Path, run_dir: Path, group: Processes, data: dict[str, Any], **changes: Any) -> Seq2SeqTraining:
    base = {"data": {"validation_split": "validation", **data}, "image_tokenizer": str(made / "tokenizer"),
            "run_dir": str(run_dir),
            **({} if "model" in changes else {"model": {"preset": "debug", "width": 32, "heads": 2, "head_dim": 16}}),
            **({} if "text" in changes else {"text": {"vocab_size": 300, "text_length": 12}}),
            "train": {"steps": 5, "batch_size": 6, "precision": "float32", "log_every": 1, "sample_every": 5},
            "optim": {"lr": 0.003, "warmup_steps": 0}, "token_corruption": 0.2, "caption_dropout": 0.3}
    run = Seq2SeqRunConfig.parse(merge(base, changes), "test")
    training = Seq2SeqTraining(run, group)
    run_training(training.task(), run, group, training.run_state)
    training.finish()
    return training


@pytest.mark.parametrize("workers", [0, 2])
def test_tokens_made_on_the_fly_train_as_stored_ones_do(workers, made, tmp_path, group):
    encode(made, tmp_path / "tokens", group, splits=["train", "validation"])
    clean = tmp_path / "clean"
    for split in ("train", "validation"):  # the damaged picture is not in the shards, so that rows would not be the same
        (clean / split).mkdir(parents=True)
        for path in (made / "data" / split).iterdir():
            if path.stem != "07" or split == "validation":
                (clean / split / path.name).write_bytes(path.read_bytes())
    trained(made, tmp_path / "stored", group, {"path": str(tmp_path / "tokens")})
    trained(made, tmp_path / "made", group, {"path": str(clean), "on_the_fly": True, "workers": workers})
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("stored", "made")]
    assert [row["loss"].hex() for row in rows[0]] == [row["loss"].hex() for row in rows[1]]
    assert len(rows[0]) == 5
    held_out = [json.loads((tmp_path / name / "validation.json").read_text())["loss"] for name in ("stored", "made")]
    assert held_out[0] == held_out[1]
    assert (tmp_path / "made/model").is_dir() and list((tmp_path / "made/samples").glob("*.png"))


def test_unusable_pictures_are_counted_and_augmentation_is_drawn_anew(made, tmp_path, group, caplog):
    training = trained(made, tmp_path / "run", group, {"path": str(made / "data"), "on_the_fly": True, "horizontal_flip": 0.5},
                       train={"steps": 8})
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["dropped_items"] == 1
    assert "passed over 1 unusable pictures (1 not an image)" in caplog.text
    pixels = [training.visits[ItemId(epoch, 3)].pixels[0] for epoch in range(12)]
    assert {bool((one == pixels[0]).all()) for one in pixels} == {True, False}
    assert any((one == pixels[0][:, ::-1]).all() for one in pixels)
    assert not torch.is_grad_enabled() or all(p.grad is None for p in training.image_tokenizer.parameters())


@pytest.mark.parametrize("text", [{"vocab_size": 300, "text_length": 12}, {"kind": "classes"}])
def test_streams_are_trained_on_and_rows_without_a_caption_passed_over(text, made, tmp_path, group):
    pictures = [(made / f"data/train/{row:02d}.png").read_bytes() for row in range(ROWS) if row != 7]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for split in ("train", "validation"):
        pq.write_table(pa.table({"image": pa.array([{"bytes": picture, "path": None} for picture in pictures], kind),
                                 "text": ["  " if row in (0, 5) else f"thing {row % 4}" for row in range(20)]}),
                       tmp_path / f"{split}.parquet", row_group_size=4)
    data = {"path": str(tmp_path), "on_the_fly": True, "streaming": True, "shuffle_rows": 8, "workers": 2,
            "max_bad_fraction": 0.5}
    run = {"text": text, "model": {"preset": "debug-decoder", "width": 32, "heads": 2, "head_dim": 16}}
    training = trained(made, tmp_path / "run", group, data, **run)
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["dropped_items"] == 2
    assert len(training.order._epoch_order(0).starts) > 1
    assert not any(tmp_path.glob("run/**/*.arrow"))
    for other in ({"shuffle_rows": 12}, {"streaming": False, "shuffle_rows": None}):
        with pytest.raises(ResumeError, match=r"data\.shuffle_rows 8 then"):
            trained(made, tmp_path / "run", group, {**data, **other}, train={"steps": 7}, **run)


@pytest.mark.parametrize(("data", "words"), [
    ({"horizontal_flip": 0.5}, "data.horizontal_flip is for pictures, with data.on_the_fly true"),
    ({"streaming": True}, "data.streaming is for pictures"), ({"caption_column": "x"}, "data.caption_column is for pictures"),
    ({"on_the_fly": True, "shuffle_rows": 5}, "data.shuffle_rows is for token shards and for data.streaming"),
    ({"shuffle_rows": 0}, "greater than or equal to 1")])
def test_keys_of_pictures_are_refused_for_token_shards(data, words, made, tmp_path):
    with pytest.raises(UserError, match=words):
        Seq2SeqRunConfig.parse({"data": {"path": "d", **data}, "image_tokenizer": "t", "run_dir": "r"}, "test")
