"""The engine of the server: the same pictures as generate in any company, partial images, queue, memory, failures."""

from __future__ import annotations

import random

import pytest
import torch

from inference import TextToImage
from inference.generation.scheduler import Scheduler
from inference.serving.engine import (
    Failed,
    Finished,
    NotServing,
    Overloaded,
    Partial,
    Started,
    UnknownImageError,
    UnknownModelError,
)
from tests import tiny
from tests.serving_engine import COOLER, GUIDED, PLAIN, Clock, ask, failed, finished, make_engine, rows, run
from tokenloom_common.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    return TextToImage.from_pretrained(folder, device="cpu")


# ---- the same pictures


@pytest.mark.long
def test_tokens_and_pixels_are_those_of_generate_in_mixed_company(folder, model):
    engine = make_engine(folder, rows=5)
    asked = [ask("a red heart", 2, 5, GUIDED), ask("octopus", 3, 7, COOLER), ask("a large blue apple tree", 1, 5, PLAIN),
             ask("octopus", 2, 5, GUIDED, negative_prompt="a blue square"), ask("a small green circle", 2, 0, None)]
    jobs = []
    for request in asked:  # each begins while others are at tokens of their own
        jobs.append(engine.submit(request))
        for _ in range(3):
            engine.step()
    run(engine)
    for request, job in zip(asked, jobs, strict=True):
        one = request.request
        alone = model.generate(one.prompt, one.num_images, one.params, one.seed, negative_prompt=one.negative_prompt)
        images = finished(job)
        assert [image.seed for image in images] == alone.seeds
        assert torch.equal(torch.stack([image.tokens for image in images]), alone.image_tokens)
        assert [image.image.tobytes() for image in images] == [image.tobytes() for image in alone.images]
        assert job.done


@pytest.mark.long
def test_layouts_are_drawn_and_handed_back(tmp_path):
    changes = {"layout_kind": "colors", "layout_classes": 27, "layout_grid": (2, 2)}
    folder = tiny.model_folder(tmp_path / "layouts", **changes)
    engine = make_engine(folder)
    given = engine.submit(ask(layout=[[1, 2], [3, 26]], params=GUIDED))
    sampled = engine.submit(ask(seed=3, params=GUIDED))
    run(engine)
    model = TextToImage.from_pretrained(folder, device="cpu")
    [first], [second] = finished(given), finished(sampled)
    assert first.layout.tolist() == [1, 2, 3, 26]
    alone = model.generate("a red heart", seed=3, params=GUIDED)
    assert torch.equal(second.tokens, alone.image_tokens[0])
    assert torch.equal(second.layout, alone.layouts[0])
    assert engine.models.describe("tiny")["layout"] == {"kind": "colors", "grid": [2, 2], "classes": 27}


def test_a_thread_draws_what_many_threads_submit(folder, model):
    engine = make_engine(folder)
    engine.start()
    jobs = [engine.submit(ask(images=2, seed=seed)) for seed in range(3)]
    events = [list(job) for job in jobs]
    engine.drain(60)
    assert not engine.healthy
    for seed, of_job in enumerate(events):
        assert [type(event) for event in of_job] == [Started, Finished, Finished]
        assert torch.equal(of_job[1].tokens, model.sample_tokens("a red heart", seed=seed, params=PLAIN)[0])


# ---- events


@pytest.mark.parametrize(("wanted", "due"), [(0, []), (1, [8]), (2, [6, 11]), (3, [4, 8, 12])])
def test_partial_images_come_at_equal_shares_of_the_tokens(folder, model, wanted, due):
    engine = make_engine(folder)
    job = engine.submit(ask(images=2, params=GUIDED, partial_images=wanted))
    tokens = model.sample_tokens("a red heart", 2, params=GUIDED)
    partials, step = [], 0
    while engine.step() or step == 0:
        step += 1
        partials += [(step, event) for event in job.take() if isinstance(event, Partial)]
    assert [(step, event.index) for step, event in partials] == [(at, index) for at in due for index in (0, 1)]
    assert [event.partial_index for _, event in partials if event.index == 1] == list(range(wanted))
    for step, event in partials:
        assert event.drawn == step
        [expected] = model.pixels.decode_partial(tokens[event.index: event.index + 1, :step])
        assert event.image.tobytes() == expected.tobytes()


def test_the_first_event_says_what_is_drawn(folder):
    engine = make_engine(folder)
    job = engine.submit(ask("octopus", params=None))
    engine.step()
    [started] = job.take()
    assert started == Started(engine.models["tiny"].defaults, len(tiny.text_tokenizer().words("octopus")))


def test_each_image_is_published_as_it_ends(folder):
    engine = make_engine(folder, rows=2)
    job = engine.submit(ask(images=3))
    ended = []
    for step in range(1, 40):
        engine.step()
        ended += [(step, event.index) for event in job.take() if isinstance(event, Finished)]
    assert ended == [(16, 0), (16, 1), (32, 2)]


# ---- cancelling, deadline, end


@pytest.mark.long
def test_fifty_of_fifty_cancelled_jobs_free_their_rows_within_one_step(folder):
    engine = make_engine(folder, rows=8, queue=64)
    dice = random.Random(0)
    for number in range(50):
        keep = engine.submit(ask(seed=number, params=PLAIN))
        job = engine.submit(ask(images=dice.choice([1, 2, 3]), seed=number, params=dice.choice([GUIDED, PLAIN])))
        for _ in range(dice.randrange(1, 14)):
            engine.step()
        job.cancel()
        engine.step()
        assert rows(engine) == (0 if keep.done else 1), number
        assert job.done
        run(engine)
        assert all(event.kind == "cancelled" for event in failed(job))
        assert len(finished(keep)) == 1


def test_a_job_cancelled_in_the_queue_is_never_drawn(folder):
    engine = make_engine(folder, rows=1)
    first, second = engine.submit(ask()), engine.submit(ask())
    engine.step()
    second.cancel()
    engine.step()
    assert second.take() == [Failed(0, "cancelled", "cancelled")]
    assert engine.stats().queued == 0
    run(engine)
    assert len(finished(first)) == 1


def test_at_the_deadline_a_job_fails_and_its_rows_are_free(folder):
    clock = Clock()
    engine = make_engine(folder, rows=4, clock=clock, deadline=10)
    drawn = engine.submit(ask(images=4))
    waits = engine.submit(ask())
    for _ in range(5):
        engine.step()
    clock.now += 9.9
    engine.step()
    assert rows(engine) == 4
    clock.now += 0.1
    later = engine.submit(ask())
    engine.step()
    assert rows(engine) == 1
    for job, images in ((drawn, 4), (waits, 1)):
        assert failed(job) == [Failed(index, "not done within 10 s", "deadline") for index in range(images)]
    run(engine)
    assert len(finished(later)) == 1


def test_draining_finishes_what_is_there_and_refuses_more(folder):
    engine = make_engine(folder, rows=2)
    engine.start()
    jobs = [engine.submit(ask(images=2)) for _ in range(3)]
    engine.drain(60)
    assert [len(finished(job)) for job in jobs] == [2, 2, 2]
    assert not engine.ready
    with pytest.raises(NotServing, match="shutting down"):
        engine.submit(ask())


def test_a_job_that_came_just_before_the_end_is_drawn(folder):
    engine = make_engine(folder)
    jobs, step = [], engine.step

    def step_and_submit() -> bool:
        more = step()
        if not more and not jobs:  # between the thread's last step and its end
            jobs.append(engine.submit(ask()))
            engine._closed = "the server is shutting down"
        return more

    engine.step = step_and_submit
    engine.start()
    engine._thread.join(60)
    assert not engine.healthy
    assert len(finished(jobs[0])) == 1


def test_what_is_not_done_when_draining_ends_fails_with_a_reason(folder):
    clock = Clock()
    engine = make_engine(folder, rows=2, clock=clock)
    jobs = [engine.submit(ask(images=2)) for _ in range(2)]
    engine.step()
    step = engine.step
    engine.step = lambda: setattr(clock, "now", clock.now + 1) or step()  # a second for each step
    engine.drain(20)
    assert len(finished(jobs[0])) == 2
    assert [event.kind for event in failed(jobs[1])] == ["shutdown"] * 2
    assert rows(engine) == 0


def test_a_dead_thread_is_not_healthy_and_ends_its_jobs(folder, monkeypatch):
    engine = make_engine(folder)

    def die():
        raise RuntimeError("broken")

    monkeypatch.setattr(engine._questions, "answer_one", die)
    job = engine.submit(ask())
    engine.start()
    assert [getattr(event, "kind", None) for event in job] == [None, "error"]  # the first is Started
    engine._thread.join()
    assert not engine.healthy
    assert not engine.ready
    with pytest.raises(NotServing, match="has died"):
        engine.submit(ask())


# ---- the queue, and requests that cannot be


def test_the_queue_is_bounded_and_says_when_to_come_again(folder):
    clock = Clock()
    engine = make_engine(folder, rows=1, clock=clock, queue=3)
    for _ in range(3):
        engine.submit(ask())
    with pytest.raises(Overloaded) as unknown:
        engine.submit(ask())
    assert unknown.value.retry_after == 5
    step = Scheduler.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "step", lambda self: setattr(clock, "now", clock.now + 0.25) or step(self))
        engine.step()
        engine.submit(ask())
        with pytest.raises(Overloaded) as known:  # 4 images of 16 tokens, 4 tokens a second
            engine.submit(ask())
    assert known.value.retry_after == pytest.approx(16.0)
    assert engine.stats().queued == 3


@pytest.mark.parametrize(("request_", "message"), [
    (ask(model="tinny"), "unknown model 'tinny'; did you mean 'tiny'?"), (ask(images=0), "num_images"),
    (ask(prompt=7), "a prompt must be text"), (ask(seed=-1), "seed"), (ask(partial_images=4), "partial_images must be 0 to 3"),
    (ask(layout=[[1]]), "without layouts"), (ask(negative_prompt="blue"), "guidance_scale is 1"),
    (ask(images=1 << 40), "keeping all pictures"), (ask(params={"top_k": 3}), "must be SamplingParams")])
def test_a_request_that_cannot_be_drawn_is_refused_before_the_queue(folder, request_, message):
    engine = make_engine(folder)
    with pytest.raises(UserError, match=message.replace("?", r"\?")) as caught:
        engine.submit(request_)
    assert isinstance(caught.value, UnknownModelError) == (request_.model != "tiny")
    assert engine.stats().queued == 0


def test_guidance_with_one_row_is_refused(folder):
    engine = make_engine(folder, rows=1)
    with pytest.raises(UserError, match="needs 2 rows"):
        engine.submit(ask(params=GUIDED))


# ---- failures


def test_a_failing_decoder_costs_the_newest_job_only(folder, monkeypatch):
    engine = make_engine(folder)
    old, new = engine.submit(ask(images=2)), engine.submit(ask(seed=5))
    engine.step()
    step = Scheduler._logits
    failing = [RuntimeError("out of memory"), MemoryError("none left")]
    monkeypatch.setattr(Scheduler, "_logits", lambda self: step(self) if not failing else _raise(failing.pop()))
    engine.step()
    assert [event.reason for event in failed(new)] == ["MemoryError: none left"]
    failing.clear()
    run(engine)
    assert len(finished(old)) == 2
    later = engine.submit(ask())
    run(engine)
    assert len(finished(later)) == 1


def test_an_image_that_cannot_be_decoded_fails_alone(folder, monkeypatch):
    engine = make_engine(folder)
    good, bad = engine.submit(ask()), engine.submit(ask(images=2, seed=5, partial_images=1))
    engine.step()
    pixels = engine._loaded.batches[0].model.pixels
    decode, calls = pixels.decode, []
    monkeypatch.setattr(pixels, "decode", lambda tokens: calls.append(1) or (
        _raise(RuntimeError("no memory")) if len(calls) in (1, 4) else decode(tokens)))
    run(engine)  # calls: two partial images, then good, bad 0, bad 1
    assert len(finished(good)) == 1
    events = bad.take()
    assert [type(event) for event in events] == [Started, Partial, Failed, Finished]
    assert events[2] == Failed(0, "RuntimeError: no memory", "error")


def test_a_model_that_is_loaded_beforehand_is_warm_and_its_batch_empty(folder, monkeypatch):
    drawn, decoded = [], []
    step, decode = Scheduler.step, TextToImage.decode_tokens
    monkeypatch.setattr(Scheduler, "step", lambda self: drawn.append(self.active_rows) or step(self))
    monkeypatch.setattr(TextToImage, "decode_tokens", lambda self, tokens: decoded.append(len(tokens)) or decode(self, tokens))
    engine = make_engine(folder)
    engine.load("tiny")
    assert (len(drawn), decoded) == (2, [1])
    assert engine.stats().active_rows == 0
    assert not engine.step()  # nothing is left to do


def test_a_caption_that_cannot_be_encoded_fails_its_job(folder, monkeypatch):
    engine = make_engine(folder)
    engine.load("tiny")
    tokenizer = engine._loaded.batches[0].model.text_tokenizer
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode",
                        lambda texts: _raise(RuntimeError("odd")) if texts == ["odd"] else encode(texts))
    odd, even = engine.submit(ask("odd")), engine.submit(ask())
    run(engine)
    assert [event.reason for event in failed(odd)] == ["RuntimeError: odd"]
    assert len(finished(even)) == 1


def _raise(error: Exception):
    raise error


# ---- words of a finished image


def test_words_are_those_of_attention_map_in_one_pass(folder, model, monkeypatch):
    engine = make_engine(folder)
    prompt = "a large blue apple tree"
    job = engine.submit(ask(prompt, params=GUIDED))
    run(engine)
    [image] = finished(job)
    passes = []
    original = type(model.seq2seq).forward
    monkeypatch.setattr(type(model.seq2seq), "forward", lambda *args, **kw: passes.append(1) or original(*args, **kw))
    answers = [engine.words(image.id) for _ in range(2)]
    run(engine)
    assert len(passes) == 1
    words = answers[0].result(0)
    assert answers[1].result(0) is words
    assert [word.word for word in words] == prompt.split()
    assert [prompt[word.start: word.end] for word in words] == prompt.split()
    for word in words:
        assert torch.equal(word.weights, model.attention_map(prompt, word.word, image.tokens[None]))


def test_only_the_last_images_are_kept(folder):
    engine = make_engine(folder, kept_images=3)
    job = engine.submit(ask(images=5))
    run(engine)
    images = finished(job)
    assert len(engine.kept) == 3
    with pytest.raises(UnknownImageError, match="the last 3 are kept"):
        engine.words(images[1].id)
    with pytest.raises(UnknownImageError):
        engine.words("nothing")
    answer = engine.words(images[2].id)
    run(engine)
    assert len(answer.result(0)) == 3


@pytest.mark.long
def test_nothing_is_left_behind_by_many_jobs(folder):
    engine = make_engine(folder, rows=4, kept_images=8)
    drawn = 0
    for seed in range(40):
        job = engine.submit(ask(images=2, seed=seed, partial_images=seed % 4))
        engine.step()
        if seed % 3 == 0:
            job.cancel()
        run(engine)
        drawn += len(finished(job))
    batch = engine._loaded.batches[0]
    assert not engine._queue
    assert not engine._running
    assert not batch._drawn
    assert not batch.scheduler._queue
    assert len(engine.kept) == 8
    assert drawn == 52
    assert engine.stats().tokens > 52 * 16
