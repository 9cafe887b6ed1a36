"""Events of a job: in threads and in event loops, none lost, none after the last."""

from __future__ import annotations

import asyncio
import threading

import pytest
from PIL import Image

from inference.requests import PromptRequest
from inference.sampling import SamplingParams
from inference.serving.engine.jobs import EngineRequest, Failed, Job, JobFailedError, Partial, Started
from tokenloom_common.errors import RunFailedError

STARTED = Started(SamplingParams(), 3)
PICTURE = Image.new("RGB", (2, 2))


def make_job(images: int = 2, **fields) -> Job:
    return Job(EngineRequest("tiny", PromptRequest("a", images)), 0.0, 10.0, **fields)


def test_an_event_loop_gets_all_events_of_another_thread_in_order():
    job = make_job()
    events = [STARTED, Partial(1, PICTURE, 0, 4), Failed(1, "b"), Failed(0, "a")]
    asked = threading.Event()

    def publish():
        asked.wait(10)
        for event in events:
            job.publish(event)

    async def take():
        asyncio.get_running_loop().call_soon(asked.set)  # once the first wait has begun
        return [await job.next_event() for _ in events]

    thread = threading.Thread(target=publish)
    thread.start()
    assert asyncio.run(take()) == events
    thread.join()


def test_a_wait_that_is_given_up_loses_nothing():
    job = make_job(1)

    async def take():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await job.next_event()
        job.publish(STARTED)
        return await job.next_event()

    assert asyncio.run(take()) == STARTED


def test_a_closed_event_loop_harms_nobody():
    job = make_job(1)

    async def leave():
        waiting = asyncio.create_task(job.next_event())
        await asyncio.sleep(0)
        waiting.cancel()

    asyncio.run(leave())
    job.publish(STARTED)
    assert job.take() == [STARTED]


def test_an_image_ends_once():
    job = make_job()
    assert not job.done
    assert job.left == [0, 1]
    job.publish(Failed(1, "first"))
    job.publish(Failed(1, "second"))
    job.publish(Partial(1, PICTURE, 0, 4))
    assert job.fail("all", "deadline") == 1
    assert job.done
    assert list(job) == [Failed(1, "first"), Failed(0, "all", "deadline")]
    assert list(job) == []


def test_cancelling_tells_the_engine():
    told = []
    job = make_job(wake=lambda: told.append(job.cancelled))
    job.cancel()
    assert told == [True]


def test_a_failure_is_an_exception_of_its_kind():
    error = Failed(0, "not done within 10 s", "deadline").error()
    assert isinstance(error, JobFailedError)
    assert isinstance(error, RunFailedError)
    assert (str(error), error.kind) == ("not done within 10 s", "deadline")
