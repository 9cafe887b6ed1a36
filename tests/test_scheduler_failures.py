"""Continuous batching: jobs that fail, that are refused, and that need no step at all."""

from __future__ import annotations

import pytest
import torch

from inference.decoder.cached_decoder import CachedDecoder
from inference.generation.image_job import FailedImage, ImageJob
from inference.generation.scheduler import Scheduler
from inference.sampling import SamplingParams
from seq2seq import TextBatch
from tests import tiny
from tests.decoder_shapes import build
from tests.scheduling import KINDS, PLAIN, alone, check_equal, job
from tokenloom_common.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def text():
    return tiny.text_tokenizer().encode(["a red heart", "a large blue apple tree", "", "octopus"])


@pytest.fixture(scope="module")
def decoder():
    return CachedDecoder(tiny.seq2seq())


def fails(monkeypatch, method: str, when):
    """Make a method of the decoder raise where `when(*arguments)`; -> how often it was asked."""
    original, asked = getattr(CachedDecoder, method), []

    def failing(self, *args, **kwargs):
        asked.append(args)
        if when(*args):
            raise RuntimeError("out of memory:\n tried to allocate 9 GiB")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(CachedDecoder, method, failing)
    return asked


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_a_text_that_fails_fails_its_job_alone(decoder, text, monkeypatch, bad):
    given = {at: job(text, at, KINDS["guided"], [5, 6], name=at) for at in (0, 1, 3)}
    expected = {at: one for at, one in given.items() if at != bad}
    with monkeypatch.context() as patch:
        fails(patch, "prefill", lambda text, _: torch.equal(text.text_input, given[bad].captions.text_input))
        scheduler = Scheduler(decoder, rows=3)
        tickets = {scheduler.submit(one): at for at, one in given.items()}
        ended = list(scheduler.run())
    failed = [picture for picture in ended if isinstance(picture, FailedImage)]
    assert [(p.name, p.index) for p in failed] == [(bad, 0), (bad, 1)]
    assert {p.reason for p in failed} == {"RuntimeError: out of memory: tried to allocate 9 GiB"}
    check_equal(decoder, {t: expected[at] for t, at in tickets.items() if at != bad}, [p for p in ended if p not in failed])
    assert scheduler.active_rows == 0


def test_a_job_that_fails_half_way_keeps_the_pictures_that_have_begun(monkeypatch):
    model, text, _ = build("decoder-only layout")
    decoder = CachedDecoder(model)
    scheduler = Scheduler(decoder, rows=2)
    one, other = job(text, 0, PLAIN, range(5)), job(text, 1, PLAIN, [9])
    ticket, second = scheduler.submit(one), scheduler.submit(other)
    ended = scheduler.step()
    with monkeypatch.context() as patch:
        fails(patch, "decode_layout", lambda *_: True)
        while not ended:
            ended += scheduler.step()
        ended += scheduler.step()
    assert [(type(p).__name__, p.ticket, p.index) for p in ended] == [
        ("FinishedImage", ticket, 0), ("FinishedImage", ticket, 1), *[("FailedImage", ticket, i) for i in (2, 3, 4)],
        ("FailedImage", second, 0)]
    again = scheduler.submit(other)
    check_equal(decoder, {again: other}, list(scheduler.run()))


def test_a_step_that_raised_can_be_repeated_and_loses_nothing(decoder, text, monkeypatch):
    scheduler = Scheduler(decoder, rows=3)
    given = [job(text, 0, KINDS["guided"], [1, 2]), job(text, 1, PLAIN, [3])]
    jobs = {scheduler.submit(one): one for one in given}
    with monkeypatch.context() as patch:
        fails(patch, "prefill", lambda text, _: torch.equal(text.text_input, given[1].captions.text_input))
        asked = fails(patch, "decode_at", lambda *_: len(asked) % 2)
        ended = []
        while scheduler.waiting or scheduler.drawing:
            try:
                ended += scheduler.step()
            except RuntimeError:
                assert len(asked) % 2
    failed = [picture for picture in ended if isinstance(picture, FailedImage)]
    assert [(p.ticket, p.index) for p in failed] == [(1, 0)]
    check_equal(decoder, {0: jobs[0]}, [picture for picture in ended if picture not in failed])


def test_run_takes_jobs_as_it_needs_them(decoder, text):
    taken = []

    def jobs():
        for at in range(12):
            taken.append(at)
            yield job(text, at % 4, KINDS["guided"] if at % 3 else PLAIN, [at], name=at)

    ended = []
    for picture in Scheduler(decoder, rows=2).run(jobs()):
        ended.append(picture)
        assert len(taken) <= len(ended) + 4  # those in the batch, and as many as it has rows
    assert sorted(picture.name for picture in ended) == list(range(12))
    expected = [alone(decoder, one)[0][0] for one in jobs()]
    assert all(torch.equal(picture.image_tokens, expected[picture.name]) for picture in ended)


def test_a_picture_of_two_tokens_without_a_begin_slot(text):
    decoder = CachedDecoder(tiny.decoder_only(begin_of_image=False, grid=(1, 2)))
    scheduler = Scheduler(decoder, rows=2)
    first = SamplingParams(guidance_scale=3.0, guidance_end=0.5)  # guidance acts on token 0 alone, which no step computes
    jobs = {scheduler.submit(one): one for one in (job(text, 0, first, range(3)), job(text, 1, KINDS["guided"], [4]))}
    check_equal(decoder, jobs, list(scheduler.run()))


def test_pictures_of_one_token_without_a_begin_slot_need_no_step(text):
    decoder = CachedDecoder(tiny.decoder_only(begin_of_image=False, grid=(1, 1)))
    scheduler = Scheduler(decoder, rows=2)
    jobs = {scheduler.submit(one): one for one in (job(text, 0, KINDS["guided"], range(3)), job(text, 1, PLAIN, [4]))}
    check_equal(decoder, jobs, list(scheduler.run()))
    assert scheduler.forwards == 0


LAYOUT = torch.zeros(2, 6, dtype=torch.int64)


def ones(captions: int, length: int) -> TextBatch:
    return TextBatch(torch.ones(captions, length, dtype=torch.int64), torch.ones(captions, length, dtype=torch.bool))


@pytest.mark.parametrize(("change", "words"), [
    ({"params": SamplingParams(guidance_scale=2.0)}, "needs 2 rows, and there is 1"),
    ({"seeds": []}, "without seeds"),
    ({"seeds": [1, -1]}, "got -1"),
    ({"seeds": [True]}, "got True"),
    ({"seeds": [1 << 63]}, "whole number"),
    ({"layout": LAYOUT[:1]}, r"\(1, 6\) numbers for 2 images"),
    ({"layout": LAYOUT[:, :5]}, "reads 6 per image"),
    ({"layout": LAYOUT - 1}, "0 to 4, found -1"),
    ({"layout": LAYOUT + 5}, "0 to 4, found 5"),
    ({"captions": ones(2, 12)}, "one caption of 12"),
    ({"unconditional": ones(1, 5)}, "unconditional: a job has one"),
])
def test_a_job_that_can_never_be_drawn_is_refused(text, change, words):
    model, _, _ = build("encoder-decoder layout")
    scheduler = Scheduler(CachedDecoder(model), rows=1)
    good = job(text, 0, PLAIN, [1, 2], LAYOUT)
    with pytest.raises(UserError, match=words):
        scheduler.submit(ImageJob(**{**vars(good), **change}))
    assert scheduler.waiting == 0
    scheduler.submit(good)


def test_guidance_that_acts_on_a_sampled_layout_alone(text):
    decoder = CachedDecoder(tiny.seq2seq(grid=(1, 2), layout_kind="classes", layout_classes=5, layout_grid=(2, 3)))
    params = SamplingParams(guidance_scale=5.0, guidance_schedule="linear", guidance_end=0.4)  # tokens 1 and 2 of 6, none of 2
    sampled, given = job(text, 0, params, [1]), job(text, 0, params, [1], LAYOUT[:1])
    with pytest.raises(UserError, match="needs 2 rows"):
        Scheduler(decoder, rows=1).submit(sampled)
    scheduler = Scheduler(decoder, rows=2)
    jobs = {scheduler.submit(one): one for one in (given, given)}
    check_equal(decoder, jobs, list(scheduler.run()))
    assert scheduler.forwards == 2  # a row each
    jobs = {scheduler.submit(one): one for one in (sampled, sampled)}
    ended = scheduler.step()
    assert (scheduler.active_rows, scheduler.waiting) == (1, 1)
    check_equal(decoder, jobs, ended + list(scheduler.run()))


def test_a_layout_for_a_model_without_is_refused(decoder, text):
    with pytest.raises(UserError, match="without layouts"):
        Scheduler(decoder, 2).submit(job(text, 0, PLAIN, [1, 2], LAYOUT))


@pytest.mark.parametrize("rows", [0, -1, 1.5, True, "2"])
def test_rows_must_be_a_number(decoder, rows):
    with pytest.raises(UserError, match="rows must be"):
        Scheduler(decoder, rows)
