"""The server's model thread: jobs of any model, parameters and seeds share its batches.

    engine = Engine(Models({"emoji": folder}))
    engine.start()
    job = engine.submit(EngineRequest("emoji", PromptRequest("a red heart", num_images=4)))
    for event in job:  # Started, then Partial, Finished or Failed of each image
        ...

The same seed gives the same picture as `TextToImage.generate`, whatever shares the batch. Without
`start`, `step` does the thread's work piece by piece.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from inference.attention_maps import WordMap
from inference.serving.engine.batches import ModelBatch
from inference.serving.engine.figures import EngineLimits, EngineStats, Speed
from inference.serving.engine.jobs import (
    EngineRequest,
    FailureKind,
    Job,
    NotServing,
    Overloaded,
)
from inference.serving.engine.kept_images import KeptImage, KeptImages, WordQuestions
from inference.serving.engine.loaded_models import LoadedModels, names_of
from inference.serving.engine.models import Models
from inference.serving.engine.requests import check_request
from tokenloom_common.errors import UserError, one_line

log = logging.getLogger(__name__)


class Engine:
    """Owns the models and draws all jobs. clock: in seconds."""

    def __init__(self, models: Models, limits: EngineLimits = EngineLimits(),  # noqa: B008
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.models = models
        self.limits = limits
        self.kept = KeptImages(limits.kept_images)
        self.speed = Speed()
        self._clock = clock
        self._questions = WordQuestions(self._words, limits.queue)
        self._loaded = LoadedModels(models, self._load, limits.turn, clock)
        self._thread: threading.Thread | None = None
        # what threads share, under _changed
        self._changed = threading.Condition()
        self._awake = False  # something has changed since the thread looked
        self._closed = ""  # why no jobs are taken any more
        self._end_at: float | None = None  # when those that are left fail
        self._queue: deque[Job] = deque()
        self._running: dict[Job, ModelBatch] = {}

    # ---- for callers, from any thread

    @property
    def healthy(self) -> bool:
        """Whether the model thread is there."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether jobs are taken and drawn."""
        return self.healthy and not self._closed

    def submit(self, request: EngineRequest) -> Job:
        """Queue a request.

        UserError for one that can never be drawn (UnknownModelError for its model), Overloaded
        where the queue is full, NotServing where no more jobs are taken.
        """
        check_request(self.models, request)
        now = self._clock()
        job = Job(request, now, now + self.limits.deadline, self._wake)
        with self._changed:
            self._check_open()
            if len(self._queue) >= self.limits.queue:
                raise Overloaded(self._wait())
            self._queue.append(job)
        self._wake()
        return job

    def words(self, image_id: str) -> Future[list[WordMap]]:
        """Ask how much each part of a finished image attended to each word of its prompt.

        image_id: of its Finished. UnknownImageError for one that is not kept, Overloaded for
        too many questions at once, NotServing where none are answered any more.
        """
        with self._changed:
            self._check_open()
            answer = self._questions.ask(self.kept.get(image_id))
        self._wake()
        return answer

    def stats(self) -> EngineStats:
        """Return the engine's figures."""
        batches = self._loaded.batches
        return EngineStats(
            queued=len(self._queue),
            active_rows=sum(batch.scheduler.active_rows for batch in batches),
            rows=sum(batch.scheduler.rows for batch in batches),
            tokens=self.speed.tokens, tokens_per_second=self.speed.lately(self._clock()),
            loaded=names_of(batches), model_bytes=self._loaded.bytes)

    def _check_open(self) -> None:
        if self._closed:
            raise NotServing(self._closed)

    def _wait(self) -> float:
        """Return the seconds until all that is queued and running should be drawn."""
        tokens = sum(len(job.left) * self.models[job.request.model].config.num_tokens
                     for job in (*self._queue, *self._running))
        return min(self.speed.seconds_for(tokens), self.limits.deadline)

    def _wake(self) -> None:
        with self._changed:
            self._awake = True
            self._changed.notify_all()

    # ---- beginning and end

    def load(self, name: str) -> None:
        """Load and warm up a model before the first job needs it; to be called before `start`.

        UserError for one that cannot be loaded.
        """
        self.models.check_budget(name)
        batch = self._loaded.get(name)
        if batch is not None:
            batch.warm_up()

    def start(self) -> None:
        """Start the model thread."""
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def drain(self, seconds: float) -> None:
        """Take no more jobs, finish those that are there, and end the thread.

        What is not done after `seconds` fails (kind "shutdown").
        """
        with self._changed:
            self._closed = self._closed or "the server is shutting down"
            self._end_at = self._clock() + seconds
        self._wake()
        if self._thread is not None:
            self._thread.join()
        else:
            while self.step():
                pass

    def close(self) -> None:
        """End at once: what is not done fails."""
        self.drain(0.0)

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._awake = False
                if self.step():
                    continue
                with self._changed:
                    # a job that came after the step was taken, and is drawn
                    if self._closed and not self._has_work():
                        return
                    self._changed.wait_for(lambda: self._awake)
        except BaseException:  # nobody else would hear of it
            log.critical("the model thread has died", exc_info=True)
            with self._changed:
                self._closed = "the model thread has died; restart the server"
            self._end(self._open_jobs(), self._closed, "error")
            self._questions.refuse(self._closed)

    # ---- the model thread's work

    def step(self) -> bool:
        """Do the next piece of work: one decoder step at most. False if there is none left."""
        self._end_jobs()
        self._admit_jobs()
        self._questions.answer_one()
        batch = self._loaded.next_turn()
        if batch is not None:
            self._draw(batch)
        with self._changed:
            return self._has_work()

    def _has_work(self) -> bool:
        return bool(self._queue or self._running or len(self._questions))

    def _open_jobs(self) -> list[Job]:
        with self._changed:
            return [*self._queue, *self._running]

    def _end_jobs(self) -> None:
        """End jobs that were cancelled, are late, or that the server's end leaves no time for."""
        now = self._clock()
        jobs = self._open_jobs()
        if self._end_at is not None and now >= self._end_at:
            self._end(jobs, "the server was shut down before it was drawn", "shutdown")
            self._questions.refuse(self._closed)
            return
        for job in jobs:
            if job.cancelled:
                self._end([job], "cancelled", "cancelled")
            elif now >= job.deadline:
                self._end([job], f"not done within {self.limits.deadline:g} s", "deadline")

    def _end(self, jobs: list[Job], reason: str, kind: FailureKind) -> None:
        for job in jobs:
            with self._changed:
                if job in self._queue:
                    self._queue.remove(job)
                batch = self._running.pop(job, None)
            if batch is not None:
                batch.drop(job)
            job.fail(reason, kind)

    def _admit_jobs(self) -> None:
        """Put waiting jobs into the batches, first come first served for each model."""
        waits: set[str] = set()  # models whose jobs wait
        with self._changed:
            queued = list(self._queue)
        wanted = {job.request.model for job in queued}
        for job in queued:
            name = job.request.model
            if name in waits:
                continue
            try:
                batch = self._loaded.get(name, wanted)
                if batch is None:
                    waits |= {name} | self._loaded.in_the_way(name, wanted)
                elif not batch.has_room(job.request):
                    waits.add(name)
                else:
                    self._admit(job, batch)
            except Exception as error:
                log.exception("a job of model %s cannot be drawn", name)
                self._end([job], one_line(error), "error")

    def _admit(self, job: Job, batch: ModelBatch) -> None:
        try:
            batch.admit(job)
        except UserError as error:  # not logged: it may quote the prompt
            self._end([job], one_line(error), "invalid")
            return
        with self._changed:
            self._queue.remove(job)
            self._running[job] = batch

    def _draw(self, batch: ModelBatch) -> None:
        """Draw one token of every image of a batch."""
        start = self._clock()
        tokens = batch.step()
        self.speed.add(tokens, start, self._clock())
        with self._changed:
            for job in [job for job in self._running if job.done]:
                del self._running[job]

    def _words(self, image: KeptImage) -> list[WordMap]:
        """Return the words of an image, by the model that drew it."""
        with self._changed:
            wanted = {job.request.model for job in self._queue}
        batch = self._loaded.get(image.model, wanted)
        if batch is None:
            raise Overloaded(self.limits.turn, "the image's model does not fit beside those that "
                             "are drawing")
        layout = None if image.layout is None else image.layout[None]
        return batch.model.word_maps(image.prompt, image.tokens[None], layout)

    def _load(self, name: str) -> ModelBatch:
        model = self.models[name].load()
        return ModelBatch(name, model, self.models.options.rows, self.kept.add, self._clock)
