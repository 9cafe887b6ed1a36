"""Networks and checks that a generator's images are measured with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from inference import TextToImage
from inference.scoring.matcher_folder import load_matcher
from inference.scoring.scorer import ImageTextScorer
from tokenloom_common.errors import UserError
from training.data.sources.open_dataset import open_dataset
from training.evaluation.caption_accuracy import TrainingPictures
from training.evaluation.image_metrics.features import FeatureExtractor
from training.evaluation.image_metrics.frechet import load_frechet_inputs
from training.evaluation.image_metrics.reference import ReferenceStatistics
from training.evaluation.options import GeneratorEvaluationOptions
from training.evaluation.questions import Question
from training.evaluation.scenes.captions import parse_caption
from training.evaluation.scenes.reader import LARGEST, SMALLEST


@dataclass(frozen=True)
class Scorers:
    """The means of measuring images; None, or False, leaves one out.

    reads_scenes: whether to read coloured shapes, as the captions of the shapes data describe.
    reference: statistics of real images to measure the Frechet distance against, instead of the
        images that belong to the captions.
    training: training images, among which the nearest one is found.
    """

    matcher: ImageTextScorer | None = None
    extractor: FeatureExtractor | None = None
    reads_scenes: bool = False
    reference: ReferenceStatistics | None = None
    training: TrainingPictures | None = None

    @property
    def any(self) -> bool:
        """Whether images are measured at all."""
        return (self.matcher is not None or self.extractor is not None or self.reads_scenes
                or self.training is not None)


def load_scorers(options: GeneratorEvaluationOptions, data: str, model: TextToImage,
                 questions: Sequence[Question], device: str) -> Scorers:
    """Load what the options ask for. UserError for captions or images that cannot be checked."""
    matcher = None if options.matcher is None else load_matcher(options.matcher, device)
    extractor, reference = load_frechet_inputs(options, model.image_tokenizer, device)

    # the scene reader knows only square images of these sizes
    side = model.image_tokenizer.config.resolution
    readable = SMALLEST <= side <= LARGEST
    if options.composition == "yes" and not readable:
        raise UserError(f"--composition yes: scenes of {SMALLEST} to {LARGEST} pixels can be "
                        f"read, this model's have {side}")
    reads_scenes = options.composition == "yes"
    if options.composition == "auto":
        reads_scenes = readable and _is_shapes_data(data)
    if reads_scenes:
        for question in questions:
            # a caption of another form is refused now, not after sampling
            parse_caption(question.caption)
    training = None
    if options.nearest_split is not None:
        # last, since it reads the whole split
        source = open_dataset(data, split=options.nearest_split, **options.reading)
        training = TrainingPictures(source, side, is_base_first=True)
    return Scorers(matcher, extractor, reads_scenes, reference, training)


def _is_shapes_data(path: str) -> bool:
    """Whether a folder was built by `tokenloom data shapes`."""
    try:
        # written by every builder of `tokenloom data`
        build = json.loads((Path(path) / "build.json").read_text(encoding="utf-8"))
        return bool(build["builder"] == "shapes")
    except (OSError, ValueError, TypeError, LookupError):  # hub ids, tar shards, other folders
        return False
