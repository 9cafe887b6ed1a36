"""Continuous batching: every picture as if it were alone, in a batch whose rows begin, end, move and are cancelled."""

from __future__ import annotations

import random
import weakref

import pytest
import torch

from inference.decoder.cached_decoder import CachedDecoder
from inference.decoder.kv_cache import SelfCache
from inference.generation.row_buffers import KEPT_CAPTIONS, KEPT_TEXTS
from inference.generation.scheduler import Scheduler
from inference.sampling import SamplingParams
from seq2seq import TextBatch
from tests import tiny
from tests.decoder_shapes import SHAPES, build
from tests.scheduling import KINDS, PLAIN, check_equal, job

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def text():
    return tiny.text_tokenizer().encode(["a red heart", "a large blue apple tree", "", "octopus"])


@pytest.fixture(scope="module")
def decoder():
    return CachedDecoder(tiny.seq2seq())


@pytest.mark.long
@pytest.mark.parametrize("shape", SHAPES)
def test_pictures_equal_those_drawn_alone_whatever_shares_the_batch(shape):
    model, text, layout = build(shape)
    decoder = CachedDecoder(model)
    kinds = list(KINDS.values())
    first = [job(text, 0, kinds[0], [5, 6]), job(text, 1, kinds[1], [5])]
    later = [job(text, 1, kinds[2], [7, 8, 9], unconditional=3), job(text, 3, kinds[3], [1]), job(text, 2, kinds[4], [0, 1]),
             job(text, 0, kinds[5], [5]), job(text, 0, kinds[2], [3, 4], None if layout is None else layout[:2]),
             job(text, 1, PLAIN, [5], None if layout is None else layout[:1])]
    scheduler = Scheduler(decoder, rows=5)
    jobs, ended = {}, []
    for some in (first, later):
        jobs |= {scheduler.submit(one): one for one in some}
        ended += [picture for _ in range(3) for picture in scheduler.step()]
    check_equal(decoder, jobs, ended + list(scheduler.run()))
    assert scheduler.active_rows == scheduler.waiting == scheduler.drawing == 0
    assert len({tuple(picture.image_tokens.tolist()) for picture in ended}) == len(ended)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["encoder-decoder layout", "decoder-only layout", "decoder-only dalle-masked"])
def test_every_kind_of_sampling_at_every_moment_of_admission(shape, kind):
    model, text, _ = build(shape)
    decoder = CachedDecoder(model)
    scheduler, jobs, ended = Scheduler(decoder, rows=7), {}, []
    for at in range(6):  # each begins while others are at tokens of their own
        one = job(text, at % 4, KINDS[kind] if at % 2 else PLAIN, [at, at + 1])
        jobs[scheduler.submit(one)] = one
        ended += [picture for _ in range(2) for picture in scheduler.step()]
    check_equal(decoder, jobs, ended + list(scheduler.run()))


@pytest.mark.long
@pytest.mark.parametrize("shape", ["encoder-decoder default", "decoder-only dalle-masked", "decoder-only layout"])
def test_any_order_of_calls_keeps_the_promise(shape):
    model, text, _ = build(shape)
    decoder = CachedDecoder(model)
    dice = random.Random(3)
    scheduler, jobs, ended = Scheduler(decoder, rows=4), {}, []
    for _ in range(30):
        if dice.random() < 0.4:
            one = job(text, dice.randrange(4), dice.choice([*KINDS.values(), PLAIN]), range(dice.randrange(1, 4)),
                      unconditional=dice.randrange(4))
            jobs[scheduler.submit(one)] = one
        if dice.random() < 0.15 and jobs:
            ticket = dice.choice(list(jobs))
            if scheduler.cancel(ticket):
                del jobs[ticket]
                ended = [picture for picture in ended if picture.ticket != ticket]
        ended += scheduler.step()
        assert sorted(r.index for p in scheduler._images for r in p.rows) == list(range(scheduler.active_rows))
    check_equal(decoder, jobs, ended + list(scheduler.run()))
    assert len(jobs) > 5


def test_a_job_larger_than_the_batch_is_drawn_in_parts(decoder, text):
    scheduler = Scheduler(decoder, rows=3)
    one = job(text, 0, KINDS["guided"], range(5))
    ticket = scheduler.submit(one)
    check_equal(decoder, {ticket: one}, list(scheduler.run()))


def test_no_row_moves_without_need_and_no_step_looks_past_its_pictures(decoder, text, monkeypatch):
    moved, ends, decode_at = [], [], CachedDecoder.decode_at
    monkeypatch.setattr(SelfCache, "move_row", lambda self, *places: moved.append(places))
    monkeypatch.setattr(CachedDecoder, "decode_at", lambda *args, end: ends.append(end) or decode_at(*args, end=end))
    scheduler = Scheduler(decoder, rows=4)
    scheduler.submit(job(text, 0, PLAIN, range(4)))
    assert len(list(scheduler.run())) == 4
    assert moved == []
    assert ends == list(range(1, 17))


@pytest.mark.parametrize(("jobs", "rows", "forwards"), [
    ([1, 1, 1], 2, 32), ([1, 1, 1, 1], 4, 16), ([4], 4, 16), ([30], 8, 4 * 16), ([3, 2], 5, 16), ([3, 2], 4, 32)])
def test_forwards_are_what_continuous_batching_promises(decoder, text, jobs, rows, forwards):
    scheduler = Scheduler(decoder, rows)
    for count in jobs:
        scheduler.submit(job(text, 0, PLAIN, range(count)))
    assert len(list(scheduler.run())) == sum(jobs)
    assert scheduler.forwards == forwards


def test_a_free_row_is_filled_at_the_next_step(decoder, text):
    scheduler = Scheduler(decoder, rows=2)
    for at in range(2):
        scheduler.submit(job(text, at, PLAIN, [0], name=at))
        scheduler.step(), scheduler.step()
    scheduler.submit(job(text, 2, PLAIN, [0], name=2))
    while not (ended := scheduler.step()):
        pass
    assert [picture.name for picture in ended] == [0]
    assert (scheduler.forwards, scheduler.active_rows, scheduler.waiting) == (16, 1, 1)
    scheduler.step()
    assert (scheduler.active_rows, scheduler.waiting) == (2, 0)
    assert [picture.name for picture in scheduler.run()] == [1, 2]
    assert scheduler.forwards == 32


def test_the_queue_is_first_come_first_served_and_nobody_overtakes(decoder, text):
    scheduler = Scheduler(decoder, rows=3)
    for name, params in enumerate([PLAIN, PLAIN, KINDS["guided"], PLAIN, PLAIN]):
        scheduler.submit(job(text, 0, params, [name], name=name))
    scheduler.step()
    assert scheduler.active_rows == 2  # the third row is kept from jobs 3 and 4: job 2 needs two
    assert [picture.name for picture in scheduler.run()] == [0, 1, 2, 3, 4]


def test_the_second_row_is_free_as_soon_as_guidance_ends(decoder, text):
    half = SamplingParams(guidance_scale=2.0, guidance_end=0.5, top_k=8)
    scheduler = Scheduler(decoder, rows=2)
    jobs = {scheduler.submit(one): one for one in (job(text, 0, half, [1]), job(text, 1, PLAIN, [2]))}
    ended = [picture for _ in range(8) for picture in scheduler.step()]
    assert (scheduler.active_rows, scheduler.waiting) == (1, 1)
    ended += scheduler.step()
    assert (scheduler.active_rows, scheduler.waiting) == (2, 0)
    ended += scheduler.run()
    assert scheduler.forwards == 8 + 16
    check_equal(decoder, jobs, ended)


def test_cancelling_frees_rows_at_once_and_touches_nobody_else(decoder, text):
    scheduler = Scheduler(decoder, rows=6)
    given = [job(text, at, KINDS["guided"], [at]) for at in range(3)] + [job(text, 1, PLAIN, [7, 8])]
    tickets = [scheduler.submit(one) for one in given]
    for _ in range(5):
        scheduler.step()
    assert (scheduler.active_rows, scheduler.waiting) == (6, 2)
    assert scheduler.cancel(tickets[0]) == 1
    assert scheduler.active_rows == 4
    scheduler.step()
    assert scheduler.active_rows == 6  # the rows are used again
    late = job(text, 3, PLAIN, [9])
    tickets.append(scheduler.submit(late))
    queued = scheduler.submit(job(text, 3, PLAIN, range(50)))
    assert scheduler.cancel(queued) == 50
    assert scheduler.waiting == 1
    assert scheduler.cancel(queued) == scheduler.cancel(12345) == 0
    ended = list(scheduler.run())
    check_equal(decoder, dict(zip(tickets[1:], [*given[1:], late], strict=True)), ended)
    assert scheduler.cancel(tickets[1]) == 0


def test_a_cancelled_job_gives_no_more_pictures(decoder, text):
    scheduler = Scheduler(decoder, rows=4)
    ticket, other = scheduler.submit(job(text, 0, PLAIN, range(6))), scheduler.submit(job(text, 1, PLAIN, [3]))
    run = scheduler.run()
    assert next(run).ticket == ticket
    assert scheduler.cancel(ticket) == 5  # three were complete, two in the queue
    assert [picture.ticket for picture in run] == [other]


def test_each_text_is_worked_through_once(decoder, text, monkeypatch):
    worked, prefill = [], CachedDecoder.prefill

    def counting(self, text, images):
        worked.append(text.text_input[0].tolist())
        return prefill(self, text, images)

    monkeypatch.setattr(CachedDecoder, "prefill", counting)
    guided = KINDS["guided"]
    scheduler = Scheduler(decoder, rows=4)
    for at, unconditional in ((0, 2), (1, 2), (0, 2), (3, 1), (3, 2)):
        scheduler.submit(job(text, at, guided, range(5), unconditional=unconditional))
    assert len(list(scheduler.run())) == 25
    names = [text.text_input[at].tolist() for at in range(4)]
    assert [names.index(each) for each in worked] == [0, 2, 1, 3, 1]  # captions and unconditional texts are kept apart
    scheduler.submit(job(text, 2, PLAIN, [0], unconditional=3))
    list(scheduler.run())
    assert len(worked) == 6  # no second branch, no unconditional text


@pytest.mark.long
@pytest.mark.parametrize("shape", ["encoder-decoder default", "decoder-only default"])
def test_nothing_is_allocated_after_construction(shape, monkeypatch):
    model, text, _ = build(shape)
    alive, prefill = [], CachedDecoder.prefill

    def watched(self, *args):
        memory = prefill(self, *args)
        alive.append(weakref.ref(memory.keys[0]))
        return memory

    monkeypatch.setattr(CachedDecoder, "prefill", watched)
    scheduler = Scheduler(CachedDecoder(model), rows=4)
    buffers = [(buffer.data_ptr(), buffer.nbytes) for buffer in scheduler._buffers.tensors()]
    size = sum(nbytes for _, nbytes in buffers)
    slots = scheduler.decoder.slots + (model.config.text_length if scheduler.decoder.crosses else 0)
    floats = 2 * len(scheduler.decoder.layers) * 4 * model.config.heads * model.config.head_dim * slots
    assert floats * 4 < size < floats * 4 * 1.2  # keys and values; beside them tokens, noise and masks
    for at in range(8):
        other = TextBatch(text.text_input.roll(at, 1), text.text_mask)
        scheduler.submit(job(other, at % 4, KINDS["short guidance"], range(3)))
    while scheduler.waiting:
        scheduler.step()
        assert sum(ref() is not None for ref in alive) <= KEPT_TEXTS + 1
    list(scheduler.run())
    assert sum(ref() is not None for ref in alive) == KEPT_TEXTS < 16
    assert [(buffer.data_ptr(), buffer.nbytes) for buffer in scheduler._buffers.tensors()] == buffers


def test_a_caption_that_is_drawn_again_is_not_encoded_again(text, monkeypatch):
    decoder = CachedDecoder(tiny.seq2seq())
    encoded, prefill = [], CachedDecoder.prefill
    monkeypatch.setattr(CachedDecoder, "prefill", lambda self, *args: encoded.append(1) or prefill(self, *args))
    scheduler = Scheduler(decoder, rows=2)
    jobs = {}
    for seed in range(4):
        one = job(text, 0, PLAIN, [seed])
        jobs[scheduler.submit(one)] = one
    ended = list(scheduler.run())
    assert len(encoded) == 1
    for at in (1, 2, 3):
        scheduler.submit(job(text, at, PLAIN, [0]))
    list(scheduler.run())
    assert len(encoded) == KEPT_CAPTIONS == 4
    check_equal(decoder, jobs, ended)


def test_tokens_of_unfinished_images_are_the_first_of_the_finished_ones(decoder, text):
    scheduler = Scheduler(decoder, rows=5)
    first = scheduler.submit(job(text, 0, KINDS["guided"], range(2)))
    for _ in range(4):
        scheduler.step()
    second = scheduler.submit(job(text, 1, PLAIN, [7, 8]))  # one of them waits
    assert scheduler.free_rows == -1
    seen = {}
    while scheduler.waiting or scheduler.drawing:
        for ticket in (first, second):
            seen |= {(ticket, index, len(tokens)): tokens for index, tokens in scheduler.drawn_so_far(ticket).items()}
        seen |= {(image.ticket, image.index, 16): image.image_tokens for image in scheduler.step()}
    assert len(seen) == 13 * 2 + 16 * 2  # the first two are seen from 4 tokens on, the others from 1
    for (ticket, index, length), tokens in seen.items():
        assert torch.equal(tokens, seen[ticket, index, 16][:length])
    assert scheduler.free_rows == 5
    assert scheduler.drawn_so_far(first) == {}


def test_tokens_handed_out_stay_as_they_are(decoder, text):
    scheduler = Scheduler(decoder, rows=1)
    scheduler.submit(job(text, 0, PLAIN, range(3)))
    kept = [(picture, picture.image_tokens.tolist()) for picture in scheduler.run()]
    assert len({tuple(before) for _, before in kept}) == 3
    assert [picture.image_tokens.tolist() for picture, _ in kept] == [before for _, before in kept]


@pytest.mark.parametrize("shape", ["encoder-decoder features", "decoder-only llamagen", "encoder-decoder layout"])
def test_what_a_row_held_before_does_not_matter(shape):
    model, text, _ = build(shape)
    decoder = CachedDecoder(model)
    scheduler = Scheduler(decoder, rows=4)
    for buffer in scheduler._buffers.tensors():
        if buffer.is_floating_point():
            buffer.fill_(float("nan"))
        elif buffer.dtype == torch.bool:
            buffer.fill_(False)
    jobs, ended = {}, []
    for one in (job(text, 2, KINDS["guided"], [1]), job(text, 0, PLAIN, [1, 2]), job(text, 2, PLAIN, [3])):
        jobs[scheduler.submit(one)] = one  # the later ones are behind, so that slots and text are looked at that they hide
        ended += [picture for _ in range(3) for picture in scheduler.step()]
    check_equal(decoder, jobs, ended + list(scheduler.run()))


@pytest.mark.parametrize("shape", ["encoder-decoder features", "decoder-only llamagen"])
def test_a_job_whose_numbers_are_broken_harms_nobody(shape):
    model, text, _ = build(shape)
    decoder = CachedDecoder(model)
    broken = TextBatch(torch.full_like(text.text_input, float("nan")), text.text_mask)
    scheduler = Scheduler(decoder, rows=2)
    ahead, lost = job(text, 1, PLAIN, range(3)), scheduler.submit(job(broken, 0, PLAIN, [0]))
    ended = [picture for _ in range(8) for picture in scheduler.step()]
    jobs = {scheduler.submit(one): one for one in (ahead, job(text, 2, PLAIN, range(3)))}  # some of them follow it in its row
    ended += scheduler.run()
    check_equal(decoder, jobs, [picture for picture in ended if picture.ticket != lost])
