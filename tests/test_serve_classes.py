"""A model of classes, served: an unknown class is the request's mistake, and a known one has no note."""

from __future__ import annotations

import pytest

from inference.model_folder import save_model_folder
from inference.sampling import SamplingParams
from inference.serving.engine import Engine, ModelOptions, Models
from seq2seq import ClassLabels
from tests import tiny
from tests.serving_http import ROUTE, running
from tokenizer_image.fingerprint import code_fingerprint


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    labels, tokenizer = ClassLabels.collect(["cat", "dog"]), tiny.vqgan()
    model = tiny.seq2seq(text_vocab_size=labels.vocab_size, text_length=1, tokenizer_fingerprint=code_fingerprint(tokenizer))
    place = tmp_path_factory.mktemp("models") / "pets"
    folder = save_model_folder(place, tokenizer, model, labels, SamplingParams(), "# pets\n")
    engine = Engine(Models({"pets": folder}, ModelOptions(rows=4, device="cpu")))
    engine.load("pets")
    engine.start()
    with running(engine) as one:
        yield one
    engine.close()


@pytest.mark.parametrize(("fields", "param"), [
    ({"prompt": "secret"}, "prompt"), ({"prompt": "cat", "negative_prompt": "secret", "guidance_scale": 2.0}, None)])
def test_an_unknown_class_is_the_requests_mistake_and_not_in_the_log(server, caplog, fields, param):
    reply = server.http.post(ROUTE, json=fields)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (400, param, "invalid_value")
    assert error["message"].startswith("unknown class 'secret'; valid names: cat, dog")
    assert "secret" not in caplog.text


def test_a_class_has_no_note_about_its_length(server):
    [image] = server.http.post(ROUTE, json={"prompt": "cat"}).json()["data"]
    assert "note" not in image
