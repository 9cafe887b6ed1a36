"""What a server's log and metrics say: everything but prompts."""

from __future__ import annotations

import io
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from inference.serving.auth import ApiKey
from inference.serving.logs import SAY_PROMPTS, start_logging
from seq2seq import BPETokenizer, BPETokenizerConfig, FrozenTextEncoder
from tests import tiny
from tests.fake_engine import DESCRIBED, FakeEngine
from tests.serving_http import KEY, ROUTE, bearer, running, wait_for
from tests.test_bpe_tokenizer import bpe_files
from tokenloom_common.errors import UserError


@pytest.fixture(scope="module")
def server():
    with running(key=ApiKey(KEY)) as one:
        yield one


@pytest.fixture
def logged():
    """Lines of the log."""
    stream = io.StringIO()
    loggers = [logging.getLogger(name) for name in ("", "inference.serving", "uvicorn.error", *SAY_PROMPTS)]
    kept = [(logger.handlers, logger.level) for logger in loggers]
    start_logging(stream=stream)

    def lines(count: int) -> list[dict]:
        # a line is written once its reply has been sent
        wait_for(lambda: len(stream.getvalue().splitlines()) >= count)
        return [json.loads(line) for line in stream.getvalue().splitlines()]

    yield lines
    for logger, (handlers, level) in zip(loggers, kept, strict=True):
        logger.handlers = handlers
        logger.setLevel(level)


def test_a_log_line_says_everything_but_the_prompt(server, logged):
    asked = {"prompt": "my secret heart", "negative_prompt": "hidden", "n": 2, "seed": 4, "user": "jane@example.com"}
    reply = server.http.post(ROUTE, json=asked, headers=bearer(KEY))
    [line] = logged(1)
    assert line["request"] == reply.headers["x-request-id"]
    assert (line["route"], line["status"], line["n"], line["model"], line["prompt_characters"]) == (ROUTE, 200, 2, "fake", 15)
    assert line["seconds"] >= 0
    text = json.dumps(line)
    assert not any(word in text for word in ("secret", "hidden", "jane", KEY))
    assert len(line["user"]) == 16


def bpe_source(folder: Path) -> BPETokenizer:
    files = bpe_files(folder)
    config = BPETokenizerConfig(vocab_size=400, text_length=12)
    return BPETokenizer.from_files(files / "vocab.json", files / "merges.txt", config)


def frozen_source(folder: Path) -> FrozenTextEncoder:
    return FrozenTextEncoder.load(str(tiny.bert_folder(folder / "bert")), 12)


@pytest.mark.parametrize("source", [lambda folder: tiny.text_tokenizer(), bpe_source, frozen_source])
def test_what_is_longer_than_the_model_reads_is_said_in_the_reply_and_not_in_the_log(logged, tmp_path, source):
    source(tmp_path).encode(["my secret " * 50])
    with running(FakeEngine(plays=False)) as server, ThreadPoolExecutor() as pool:
        reply = pool.submit(server.http.post, ROUTE, json={"prompt": "my secret " * 50})
        wait_for(lambda: server.engine.waiting)
        server.engine.waiting[0].play(text_tokens=12)
        [image] = reply.result().json()["data"]
    assert image["note"].startswith("the prompt fills all 12 text tokens that this model reads")
    assert "secret" not in json.dumps(logged(1))


def test_prompts_are_logged_where_that_is_asked_for(logged):
    with running(log_prompts=True) as server:
        server.http.post(ROUTE, json={"prompt": "my secret\nheart"})
    [line] = logged(1)
    assert line["prompt"] == "my secret\nheart"


def test_a_refused_key_or_a_wrong_path_is_a_line_too_and_a_probe_is_none(server, logged):
    server.http.get("/health")
    server.http.get("/v1/models", headers=bearer("a wrong key that nobody has"))
    server.http.get("/nope")
    lines = logged(2)
    assert [(line["status"], line["route"]) for line in lines] == [(401, "/v1/models"), (401, "none")]
    assert "nobody" not in json.dumps(lines)


def test_a_model_that_cannot_be_served_is_left_out_and_the_log_alone_says_why(logged):
    engine = FakeEngine()

    def describe(name: str) -> dict:
        if name == "fake":
            raise UserError("/home/jane/models/fake: config.json is missing")
        return dict(DESCRIBED)

    engine.models.describe = describe  # type: ignore[method-assign]
    with running(engine) as server:
        assert [model["id"] for model in server.http.get("/v1/models").json()["data"]] == ["group/other"]
        reply = server.http.post(ROUTE, json={"prompt": "a", "model": "fake"})
        assert server.http.post(ROUTE, json={"prompt": "a", "model": "group/other"}).status_code == 200
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model_unavailable")
    assert "jane" not in reply.text
    reasons = [line["reason"] for line in logged(4) if "reason" in line]
    assert reasons == ["/home/jane/models/fake: config.json is missing"] * 2


def test_a_request_that_the_engine_refuses_is_counted(server, monkeypatch):
    def submit(asked):
        raise UserError("this model takes no layout")

    before = server.http.get("/metrics", headers=bearer(KEY)).text
    monkeypatch.setattr(server.engine, "submit", submit)
    reply = server.http.post(ROUTE, json={"prompt": "a"}, headers=bearer(KEY))
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, "this model takes no layout")
    name = 'tokenloom_rejected_total{reason="invalid_value"}'
    after = server.http.get("/metrics", headers=bearer(KEY)).text
    assert value(after, name) == value(before, name) + 1


def test_metrics_count_what_happened(server):
    before = server.http.get("/metrics", headers=bearer(KEY)).text
    server.http.post(ROUTE, json={"prompt": "a", "n": 3, "stream": True, "partial_images": 1}, headers=bearer(KEY))
    server.http.post(ROUTE, json={"prompt": "a", "n": 30}, headers=bearer(KEY))
    wait_for(lambda: value(server.http.get("/metrics", headers=bearer(KEY)).text, "tokenloom_request_seconds_count")
             == value(before, "tokenloom_request_seconds_count") + 2)
    after = server.http.get("/metrics", headers=bearer(KEY))
    assert after.headers["content-type"].startswith("text/plain; version=0.0.4")

    def grown(name: str) -> float:
        return value(after.text, name) - value(before, name)

    assert grown('tokenloom_images_total{model="fake"}') == 3
    assert grown('tokenloom_rejected_total{reason="invalid_value"}') == 1
    assert grown("tokenloom_request_seconds_count") == 2
    assert grown("tokenloom_first_partial_seconds_count") == 1
    assert grown("tokenloom_queue_seconds_count") == 1
    names = {line.split()[2] for line in after.text.splitlines() if line.startswith("# TYPE")}
    assert names >= {f"tokenloom_{name}" for name in (
        "queue_jobs", "requests_in_flight", "tokens_per_second", "tokens_total", "rows_active")}


def value(text: str, name: str) -> float:
    found = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(found[0].split()[-1]) if found else 0.0
