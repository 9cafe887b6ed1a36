"""Frechet distance between image sets: loading, measuring, and its section of a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokenizer_image import ImageTokenizer
from training.evaluation.image_metrics.features import (
    FID_WEIGHTS_NAME,
    FeatureExtractor,
    load_extractor,
)
from training.evaluation.image_metrics.pixel_metrics import Moments, frechet_distance
from training.evaluation.image_metrics.reference import (
    ImageHash,
    Preparation,
    ReferenceStatistics,
    check_reference,
    load_reference,
)
from training.evaluation.options import EvaluationOptions

# How `tokenizer_image.images.image_to_pixels` prepares images, in the words of a report; a test
# holds the two together.
RESIZE = "lanczos (Pillow, antialiased)"
CROP = "centre square"


class FrechetInputs(NamedTuple):
    """extractor None: no Frechet distance. reference None: compare with the images themselves."""

    extractor: FeatureExtractor | None
    reference: ReferenceStatistics | None


@dataclass(frozen=True)
class Frechet:
    """A squared Frechet distance, as in FID.

    too_few: one side has no more images than there are features, so its covariance is singular.
    measured: statistics of the originals; None where a reference was used instead.
    """

    distance: float
    too_few: bool
    count: int
    measured: ReferenceStatistics | None
    reference_count: int
    reference_fingerprint: str


def preparation(tokenizer: ImageTokenizer, extractor: FeatureExtractor | None) -> Preparation:
    """Describe how images are prepared for this tokenizer and this extractor."""
    resolution = tokenizer.config.resolution
    if extractor is None:  # still hashed with the images, for the report's fingerprint
        return Preparation("none", "", "", resolution, RESIZE, CROP)
    return Preparation(extractor.name, extractor.weights_hash, extractor.resize, resolution,
                       RESIZE, CROP)


def load_frechet_inputs(options: EvaluationOptions, tokenizer: ImageTokenizer,
                        device: str | torch.device) -> FrechetInputs:
    """Load the extractor and the reference. UserError if the reference was prepared differently."""
    if options.features == "none":
        return FrechetInputs(None, None)
    extractor = load_extractor(options.features, options.inception_weights, device)
    if options.reference is None:
        return FrechetInputs(extractor, None)

    # checked before anything is measured
    path = Path(options.reference)
    reference = load_reference(path)
    expected = preparation(tokenizer, extractor)
    check_reference(reference, expected, extractor.dimensions, path)
    return FrechetInputs(extractor, reference)


def measure_frechet(real: Moments, other: Moments, reference: ReferenceStatistics | None,
                    image_hash: ImageHash, prepared: Preparation) -> Frechet:
    """Measure the distance of `other` from `reference`, or from `real` where that is None.

    image_hash, prepared: describe the real images, for the statistics that are kept of them.
    """
    measured = None  # only what was measured here may be saved as a reference
    if reference is None:
        measured = ReferenceStatistics(real.mean, real.covariance(), real.count, prepared,
                                       image_hash.hexdigest())
        reference = measured

    distance = frechet_distance(reference.mean, reference.covariance,
                                other.mean, other.covariance())
    # the covariance of n vectors has at most rank n - 1, one less for their mean
    too_few = min(reference.count, other.count) <= len(other.mean)
    return Frechet(distance, too_few, other.count, measured, reference.count,
                   reference.fingerprint)


def frechet_section(extractor: FeatureExtractor, frechet: Frechet,
                    fingerprint: str) -> dict[str, Any]:
    """Return the report's section: everything that the distance depends on.

    fingerprint: hash of the images that the evaluation itself read.
    """
    notes = []
    if frechet.too_few:
        notes.append(f"{extractor.metric_name} compares {extractor.dimensions} features over too "
                     f"few pictures ({frechet.count:,} against {frechet.reference_count:,}): with "
                     "that many or fewer the covariance has no full rank and the number depends "
                     "on how many there are; compare it only between equally many pictures")
    if extractor.metric_name == "Inception-FD":  # people expect FID from these features
        notes.append(f"the weights are not the published {FID_WEIGHTS_NAME}, so the number is not "
                     "called rFID")
    return {
        "metric": extractor.metric_name,
        "extractor": extractor.name,
        "dimensions": extractor.dimensions,
        "weights_sha256": extractor.weights_hash,
        "input": extractor.resize,
        "samples": frechet.count,
        "reference_samples": frechet.reference_count,
        "reference_fingerprint": frechet.reference_fingerprint,
        "reference_is_these_pictures": frechet.reference_fingerprint == fingerprint,
        "samples_fewer_than_dimensions": frechet.too_few,
        "note": "; ".join(notes) or None,
    }
