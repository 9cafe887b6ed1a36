"""From a trained model folder to images."""

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
