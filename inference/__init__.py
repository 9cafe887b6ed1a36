"""A trained model folder -> pictures."""

from inference.model_folder import LoadedModel, load_model_folder, save_model_folder
from inference.pipeline import GenerationResult, GenerationStep, TextToImage
from inference.sampling import SamplingParams

__all__ = ["GenerationResult", "GenerationStep", "LoadedModel", "SamplingParams", "TextToImage", "load_model_folder",
           "save_model_folder"]
