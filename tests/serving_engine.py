"""An engine with tiny models that tests drive by hand: a clock that they move, steps that they count."""

from __future__ import annotations

from pathlib import Path

from inference.requests import PromptRequest
from inference.sampling import SamplingParams
from inference.serving.engine import Engine, EngineLimits, EngineRequest, Failed, Finished, Job, ModelOptions, Models

GUIDED = SamplingParams(guidance_scale=2.5, top_k=8)
PLAIN = SamplingParams(guidance_scale=1.0, top_k=8)
COOLER = SamplingParams(guidance_scale=1.0, temperature=0.7, top_p=0.9)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_engine(folder: Path, rows: int = 6, names=("tiny",), memory: int | None = None, clock=None, **limits) -> Engine:
    """Make an engine whose models of all `names` are the same folder; it has no thread."""
    models = Models(dict.fromkeys(names, folder), ModelOptions(rows=rows, memory=memory, device="cpu"))
    return Engine(models, EngineLimits(**limits), clock or Clock())


def ask(prompt: str = "a red heart", images: int = 1, seed: int = 0, params=PLAIN, partial_images: int = 0, model: str = "tiny",
        **fields) -> EngineRequest:
    return EngineRequest(model, PromptRequest(prompt, images, seed, params, **fields), partial_images)


def run(engine: Engine, steps: int = 1000) -> int:
    """Step until nothing is left; returns the number of steps."""
    for number in range(1, steps + 1):
        if not engine.step():
            return number
    raise AssertionError(f"not done in {steps} steps")


def finished(job: Job) -> list[Finished]:
    """Take a job's events; the images in their order."""
    return sorted((event for event in job.take() if isinstance(event, Finished)), key=lambda event: event.index)


def failed(job: Job) -> list[Failed]:
    return [event for event in job.take() if isinstance(event, Failed)]


def rows(engine: Engine) -> int:
    return engine.stats().active_rows
