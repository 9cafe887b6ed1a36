"""Several models in one engine: names and folders, turns, the memory budget, who leaves."""

from __future__ import annotations

import shutil

import pytest
import torch

from inference import TextToImage
from inference.memory.sizes import exact_and_human
from inference.serving.engine import EngineRequest, ModelOptions, Models, Overloaded, UnknownModelError
from inference.serving.engine.model_memory import attention_bytes, frozen_encoder_bytes
from inference.serving.engine.models import find_models, model_name
from seq2seq import FrozenTextEncoder
from tests import tiny
from tests.serving_engine import PLAIN, Clock, ask, failed, finished, make_engine, run
from tokenloom_common.errors import MissingFileError, UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def size(folder):
    """Predicted bytes of the model with six rows."""
    return Models({"tiny": folder}, ModelOptions(rows=6, device="cpu"))["tiny"].bytes


# ---- names and descriptions


def test_model_folders_are_found_by_their_paths(folder, tmp_path):
    for place in ("emoji", "runs/cats/model", "group/birds", "too/deep/to/see"):
        (tmp_path / place).mkdir(parents=True)
        shutil.copytree(folder, tmp_path / place, dirs_exist_ok=True)
    (tmp_path / ".hidden").mkdir()
    shutil.copy(folder / "model_index.json", tmp_path / ".hidden")
    models = Models(find_models(tmp_path), ModelOptions(device="cpu"))
    assert models.names == ("emoji", "group/birds", "runs/cats")
    assert models["runs/cats"].folder == tmp_path / "runs/cats/model"


def test_a_model_is_called_after_its_folder_or_its_run(tmp_path):
    for place in ("demo/model", "emoji"):
        (tmp_path / place).mkdir(parents=True)
    assert model_name(tmp_path / "demo/model") == "demo"
    assert model_name(tmp_path / "emoji") == "emoji"
    assert model_name("someone/emoji") == "someone/emoji"


def test_folders_that_cannot_be_served_are_named(folder, tmp_path):
    with pytest.raises(MissingFileError, match="no such folder"):
        find_models(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no model folder"):
        find_models(tmp_path)
    with pytest.raises(UserError, match="is a model folder itself"):
        find_models(folder)
    for place in ("a/model", "a/b"):
        shutil.copytree(folder, tmp_path / place)
    (tmp_path / "a" / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=r"a/model_index\.json"):
        Models(find_models(tmp_path), ModelOptions(device="cpu"))
    with pytest.raises(UserError, match="rows must be a whole number of at least 1, got 0"):
        Models({"tiny": folder}, ModelOptions(rows=0))
    with pytest.raises(UserError, match="no model is given"):
        Models({})


def test_a_description_says_what_the_model_draws(folder):
    models = Models({"tiny": folder}, ModelOptions(device="cpu"))
    described = models.describe("tiny")
    created = described.pop("created")
    fingerprint = described.pop("fingerprint")
    assert described == {
        "title": "tiny", "size": "16x16", "grid": [4, 4], "image_tokens": 16, "text_length": tiny.TEXT_LENGTH,
        "layout": None, "weights": "float32",
        "sampling": {**PLAIN.plain(), "guidance_scale": 2.0, "top_k": 8}}
    assert created > 0
    assert len(fingerprint) == 16
    with pytest.raises(UnknownModelError, match="did you mean 'tiny'"):
        models.describe("tyny")


# ---- turns


def test_two_models_take_turns(folder):
    engine = make_engine(folder, names=("a", "b"))
    many, one = engine.submit(ask(images=6, model="a")), engine.submit(ask(model="b"))
    ended = {}
    for step in range(1, 40):
        engine.step()
        for name, job in (("a", many), ("b", one)):
            if job.done:
                ended.setdefault(name, step)
    assert ended == {"a": 31, "b": 32}  # 16 steps each, one after another
    assert engine.stats().loaded == ("a", "b") or engine.stats().loaded == ("b", "a")


@pytest.mark.long
def test_models_that_do_not_fit_together_take_turns(folder, size):
    clock = Clock()
    engine = make_engine(folder, names=("a", "b"), rows=3, memory=int(1.5 * size), clock=clock, turn=15.0)
    jobs, order = [engine.submit(ask(images=3, model="a"))], []
    for step in range(120):  # there is always a job of `a`
        if step == 4:
            jobs.append(engine.submit(ask(model="b")))
        if engine.stats().queued < 2:
            jobs.append(engine.submit(ask(images=3, seed=step, model="a")))
        engine.step()
        clock.now += 0.25
        assert len(engine.stats().loaded) <= 1
        order += [number for number, job in enumerate(jobs) if job.done and number not in order]
    names = "".join(jobs[number].request.model for number in order)
    # for 15 s, 60 steps, later jobs of `a` are drawn before b's: 4 of them, since each takes 16 steps
    assert names.startswith("aaaaba")
    run(engine)
    assert all(len(finished(job)) == job.request.request.num_images for job in jobs)


# ---- memory


@pytest.mark.long
def test_the_least_recently_used_model_leaves(folder, size):
    clock = Clock()
    engine = make_engine(folder, names=("a", "b", "c"), memory=int(2.5 * size), clock=clock)
    loaded = []
    for name in ("a", "b", "a", "c", "b"):
        job = engine.submit(ask(model=name))
        run(engine)
        clock.now += 1
        assert len(finished(job)) == 1
        loaded.append(sorted(engine.stats().loaded))
        assert engine.stats().model_bytes <= 2.5 * size
    assert loaded == [["a"], ["a", "b"], ["a", "b"], ["a", "c"], ["b", "c"]]


def test_a_model_beyond_the_budget_is_refused_with_both_numbers(folder, size):
    engine = make_engine(folder, memory=size - 1)
    with pytest.raises(UserError, match="model tiny needs") as caught:
        engine.submit(ask())
    assert exact_and_human(size) in str(caught.value)
    assert "--rows" in str(caught.value)
    for call in (engine.load, engine.models.describe):
        with pytest.raises(UserError, match="model tiny needs"):
            call("tiny")


def test_a_model_that_memory_has_no_room_for_fails_its_jobs_only(folder, monkeypatch):
    engine = make_engine(folder, names=("a", "b"))
    engine.load("a")
    monkeypatch.setattr("inference.serving.engine.models.available_memory", lambda device: 1000)
    fits, lacks = engine.submit(ask(model="a")), engine.submit(ask(model="b"))
    run(engine)
    assert len(finished(fits)) == 1
    [event] = failed(lacks)
    assert event.reason.startswith("model b with 6 rows needs")


def test_a_damaged_model_fails_its_jobs_only(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "b")
    (tmp_path / "b" / "seq2seq" / "model.safetensors").write_bytes(b"nothing")
    shutil.copytree(folder, tmp_path / "a")
    engine = make_engine(folder)
    engine.models = engine._loaded.models = Models(find_models(tmp_path), ModelOptions(rows=6, device="cpu"))
    jobs = [engine.submit(ask(model="b")), engine.submit(ask(model="a")), engine.submit(ask(model="b"))]
    run(engine)
    assert [len(finished(job)) for job in jobs[1:2]] == [1]
    for job in (jobs[0], jobs[2]):
        assert "model.safetensors" in failed(job)[0].reason


def test_the_memory_of_a_frozen_text_encoder_is_counted(tmp_path):
    encoder = tiny.bert_folder(tmp_path / "bert")
    source = FrozenTextEncoder.load(str(encoder), 10)
    (tmp_path / "model").mkdir()
    source.save_pretrained(tmp_path / "model" / "text_tokenizer")
    numbers = sum(parameter.numel() for parameter in source._model.parameters())
    assert frozen_encoder_bytes(tmp_path / "model", None) == pytest.approx(4 * numbers, rel=0.05)
    shutil.move(encoder, tmp_path / "moved")
    assert frozen_encoder_bytes(tmp_path / "model", str(tmp_path / "moved")) == pytest.approx(4 * numbers, rel=0.05)


def test_the_memory_of_words_is_counted():
    both = tiny.seq2seq().config, tiny.decoder_only().config
    # heads, image slots (with the text's in a decoder-only model), slots that are read
    assert attention_bytes(both[0]) == 16 * 2 * 16 * 12
    assert attention_bytes(both[1]) == 16 * 2 * 28 * 28


def test_words_of_a_model_that_left_load_it_again(folder, size):
    engine = make_engine(folder, names=("a", "b"), memory=int(1.5 * size))
    job = engine.submit(ask(model="a"))
    run(engine)
    [image] = finished(job)
    engine.submit(ask(model="b"))
    run(engine)
    assert engine.stats().loaded == ("b",)
    answer = engine.words(image.id)
    run(engine)
    assert [word.word for word in answer.result(0)] == ["a", "red", "heart"]
    assert engine.stats().loaded == ("a",)


def test_words_of_a_model_that_there_is_no_room_for_say_so(folder, size):
    engine = make_engine(folder, names=("a", "b"), memory=int(1.5 * size))
    job = engine.submit(ask(model="a"))
    run(engine)
    [image] = finished(job)
    engine.submit(ask(model="b"))
    engine.step()
    answer = engine.words(image.id)
    engine.step()
    with pytest.raises(Overloaded, match="does not fit beside those that are drawing; try again in 5 s"):
        answer.result(0)


def test_requests_of_models_with_own_settings_use_their_own(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "plain")
    (tmp_path / "plain" / "generation_config.json").write_text('{"guidance_scale": 1.0, "top_k": 4}')
    models = Models({"tiny": folder, "plain": tmp_path / "plain"}, ModelOptions(rows=6, device="cpu"))
    assert models["plain"].defaults.top_k == 4
    engine = make_engine(folder)
    engine.models = engine._loaded.models = models
    job = engine.submit(EngineRequest("plain", ask(params=None).request))
    run(engine)
    [image] = finished(job)
    alone = TextToImage.from_pretrained(tmp_path / "plain", device="cpu").generate("a red heart")
    assert torch.equal(image.tokens, alone.image_tokens[0])
