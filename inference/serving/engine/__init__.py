"""Models, their batches and the thread that draws with them; nothing of HTTP."""

from inference.serving.engine.engine import Engine
from inference.serving.engine.figures import EngineLimits, EngineStats
from inference.serving.engine.jobs import (
    EngineRequest,
    Failed,
    Finished,
    Job,
    NotServing,
    Overloaded,
    Partial,
    Started,
    UnknownImageError,
    UnknownModelError,
)
from inference.serving.engine.models import ModelOptions, Models

__all__ = [
    "Engine",
    "EngineLimits",
    "EngineRequest",
    "EngineStats",
    "Failed",
    "Finished",
    "Job",
    "ModelOptions",
    "Models",
    "NotServing",
    "Overloaded",
    "Partial",
    "Started",
    "UnknownImageError",
    "UnknownModelError",
]
