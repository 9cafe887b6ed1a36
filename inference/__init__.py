"""From a trained model folder to images."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tokenloom_common.imports import import_before_torch

if TYPE_CHECKING:
    from inference.model_folder import LoadedModel, load_model_folder, save_model_folder
    from inference.pipeline import TextToImage
    from inference.requests import PromptRequest
    from inference.results import GenerationResult, ManyResult
    from inference.sampling import SamplingParams
    from inference.scoring.matcher import Matcher, MatcherConfig, TextTowerConfig
    from inference.scoring.matcher_folder import load_matcher
    from inference.streaming import GenerationStep

__all__ = ["GenerationResult", "GenerationStep", "LoadedModel", "ManyResult", "Matcher",
           "MatcherConfig", "PromptRequest", "SamplingParams", "TextToImage", "TextTowerConfig",
           "load_matcher", "load_model_folder", "save_model_folder"]

_NAMES = {
    "LoadedModel": "model_folder",
    "load_model_folder": "model_folder",
    "save_model_folder": "model_folder",
    "TextToImage": "pipeline",
    "PromptRequest": "requests",
    "GenerationResult": "results",
    "ManyResult": "results",
    "SamplingParams": "sampling",
    "Matcher": "scoring.matcher",
    "MatcherConfig": "scoring.matcher",
    "TextTowerConfig": "scoring.matcher",
    "load_matcher": "scoring.matcher_folder",
    "GenerationStep": "streaming",
}
"""Public name -> the module that has it."""


def __getattr__(name: str) -> Any:
    """Load a public name on first use: the commands refuse a wrong call before torch is there."""
    if name in _NAMES:
        import_before_torch()
        return getattr(importlib.import_module(f"inference.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'inference' has no attribute '{name}'")
