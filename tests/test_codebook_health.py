"""Codebook health of a tokenizer's run: usage, warnings, restarts, plots."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from tests.tokenizer_runs import VQ, config, make_data, train
from tokenloom_common.config import dotted_names
from training.config.tokenizer import TokenizerRunConfig
from training.objectives import reconstruction_health
from training.runs.metrics import read_metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "shapes")


# ---- health ----

@pytest.mark.long
def test_a_poor_codebook_is_warned_of_once_in_words_with_options_that_exist(group, data, tmp_path, caplog):
    quantizer = {"kind": "vq", "l2_normalize": False, "kmeans_init": False, "dead_code_fraction": 0.0}
    run = config(data, tmp_path / "run", model={"embed_dim": 64, "codebook_size": 64, "quantizer": quantizer},
                 train={"steps": 6}, codebook={"warn_below": 1.0})
    with caplog.at_level(logging.WARNING):
        train(run, group)
    warnings = [record.getMessage() for record in caplog.records if "codes are in use" in record.getMessage()]
    assert len(warnings) == 1
    options = re.findall(r"--([\w.]+)", warnings[0])
    assert {"model.quantizer.l2_normalize", "model.embed_dim", "model.quantizer.dead_code_fraction"} <= set(options)
    assert set(options) <= set(dotted_names(TokenizerRunConfig))
    row = read_metrics(tmp_path / "run/metrics.jsonl")[-1]
    assert row["dead_codes"] == round(64 * (1 - row["codebook_usage"])) > 0


@pytest.mark.long
def test_a_gumbel_tokenizer_cools_down_and_is_warned_of_in_its_own_options(group, data, tmp_path, caplog, monkeypatch):
    # so early no image comes through, which keeps the advice on codes back
    monkeypatch.setattr(reconstruction_health, "BLANK_BELOW", -1.0)
    quantizer = {"kind": "gumbel", "kl_weight": 0.01, "temperature_steps": 4}
    run = config(data, tmp_path / "run", model={"embed_dim": 4, "codebook_size": 64, "quantizer": quantizer},
                 train={"steps": 6}, codebook={"warn_below": 1.0})
    with caplog.at_level(logging.WARNING):
        training = train(run, group)
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    temperatures = [row["temperature"] for row in rows]
    assert temperatures == sorted(temperatures, reverse=True)
    assert (temperatures[0], temperatures[-1]) == (1.0, 1 / 16)
    assert rows[0]["weighted.kl"] == pytest.approx(0.01 * rows[0]["kl"])
    (warning,) = [record.getMessage() for record in caplog.records if "codes are in use" in record.getMessage()]
    assert "--model.quantizer.kl_weight 0.1;" in warning
    assert set(re.findall(r"--([\w.]+)", warning)) <= set(dotted_names(TokenizerRunConfig))
    raw = {"kind": "vq", "learn_codebook_by_gradient": True, "raw_search": True, "kmeans_init": False,
           "dead_code_fraction": 0.0}
    training.health.codebook.config = config(data, tmp_path / "run", model={**VQ, "quantizer": raw})
    assert not re.search("kmeans|dead_code", " ".join(training.health.codebook._remedies()))


@pytest.mark.long
def test_a_healthy_codebook_is_not_warned_of(group, data, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(config(data, tmp_path / "run", model=VQ, train={"steps": 6}), group)
    assert "codes are in use" not in caplog.text


@pytest.mark.long
def test_restarts_are_counted_and_plots_are_drawn(group, data, tmp_path):
    quantizer = {"kind": "vq", "dead_code_fraction": 0.9, "ema_decay": 0.5}
    run = config(data, tmp_path / "run", model={**VQ, "quantizer": quantizer}, train={"steps": 4, "sample_every": 4})
    train(run, group)
    assert sum(row["restarted_codes"] for row in read_metrics(tmp_path / "run/metrics.jsonl")) > 0
    assert {"curves.png", "codebook.png"} <= {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.long
def test_the_window_of_the_health_is_an_epoch_or_as_long_as_it_is_told(group, data, tmp_path):
    for window, pictures in ((0, 24), (16, 16)):
        run = config(data, tmp_path / str(window), model=VQ, codebook={"window": window}, train={"steps": 12})
        training = train(run, group)
        epoch = len(training.visits)
        per_picture = training.tokenizer.num_tokens
        seen = int(training.health.codebook.counts().sum()) // per_picture
        expected = epoch if window == 0 else pictures
        assert abs(seen - expected) <= 8, (seen, expected)
