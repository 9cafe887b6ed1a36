"""How well a tokenizer keeps a picture: the loop over pictures and what is measured in it."""

# Axes: B batch, S pixels on a side, h w code grid, K codebook size, F features

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from tokenizer_image import LPIPS, ImageTokenizer
from tokenizer_image.images import float_to_pixels, image_to_pixels, pixels_to_float
from tokenizer_image.usage import Usage, usage_of_counts
from tokenloom_common.errors import DataError, UserError
from tokenloom_common.progress import progress
from training.data.sources.captioned_images import BAD_ITEM_ERRORS, CaptionedImages
from training.evaluation.features import FeatureExtractor
from training.evaluation.metrics import PERFECT_DB, WINDOW, Moments, frechet_distance, psnr, ssim
from training.evaluation.reference import PictureHash, Preparation, ReferenceStatistics

__all__ = ["CROP", "PERFECT_DB", "RESIZE", "Evaluation", "EvaluationOptions", "Frechet", "ReconstructedBatch",
           "choose_rows", "evaluate_reconstruction", "evaluate_tokenizer", "preparation", "psnr", "reconstructed_batches"]

# What tokenizer_image.images.image_to_pixels does, in the words of a report; a test holds the two together.
RESIZE = "lanczos (Pillow, antialiased)"
CROP = "centre square"
LPIPS_PIXELS_AT_ONCE = 1 << 20  # its VGG16 keeps 64 channels at full size for both pictures


class ReconstructedBatch(NamedTuple):
    """rows: where they stand in the source. original, reconstruction: uint8 [B, S, S, 3] on the CPU. codes: [B, h, w]."""

    rows: list[int]
    original: Tensor
    reconstruction: Tensor
    codes: Tensor


def reconstructed_batches(tokenizer: ImageTokenizer, source: CaptionedImages, rows: Sequence[int], batch_size: int,
                          unusable: Counter[str], quiet: bool = False) -> Iterator[ReconstructedBatch]:
    """Send rows of a source through the tokenizer and back; pictures that cannot be read are counted by reason and left out."""
    device = next(tokenizer.parameters()).device
    for start in progress(range(0, len(rows), batch_size), "measure reconstruction", unit="batch", quiet=quiet):
        kept, pixels = [], []
        for row in rows[start: start + batch_size]:
            try:
                pixels.append(image_to_pixels(source[row].image, tokenizer.config.resolution))
                kept.append(row)
            except BAD_ITEM_ERRORS as error:
                unusable[error.reason] += 1
        if not pixels:
            continue
        original = torch.from_numpy(numpy.stack(pixels))
        codes = tokenizer.encode(pixels_to_float(original).to(device))
        yield ReconstructedBatch(kept, original, float_to_pixels(tokenizer.decode(codes)).cpu(), codes)


def evaluate_reconstruction(tokenizer: ImageTokenizer, source: CaptionedImages, batch_size: int = 64,
                            quiet: bool = False) -> dict[str, Any]:
    """Mean PSNR over pictures (8-bit RGB, at the tokenizer's resolution) and the share of codes that they use."""
    unusable: Counter[str] = Counter()
    counts, values = torch.zeros(tokenizer.codebook_size, dtype=torch.int64), []  # [K]
    for batch in reconstructed_batches(tokenizer, source, range(len(source)), batch_size, unusable, quiet):
        counts += torch.bincount(batch.codes.flatten().cpu(), minlength=len(counts))
        values.append(psnr(batch.reconstruction, batch.original))
    if not values:
        raise DataError("no usable picture to measure reconstruction on")
    usage = usage_of_counts(counts)
    return {"psnr": float(torch.cat(values).mean()), "pictures": sum(len(v) for v in values), "unusable": unusable.total(),
            "codebook_usage": usage.usage, "codebook_perplexity": usage.perplexity}


@dataclass(frozen=True)
class EvaluationOptions:
    """What to measure and on which pictures. num_images None: every row. lpips, extractor None: that number is left out.

    reference: statistics to measure the Frechet distance against, instead of those of the very pictures that are measured.
    """

    num_images: int | None = None
    seed: int = 0
    batch_size: int = 64
    lpips: LPIPS | None = None
    extractor: FeatureExtractor | None = None
    reference: ReferenceStatistics | None = None


@dataclass(frozen=True)
class Frechet:
    """distance: squared, as in FID. too_few: a side has no more pictures than there are features, so no full covariance."""

    distance: float
    too_few: bool
    count: int
    measured: ReferenceStatistics | None  # of the originals; None where a reference took their place
    reference_count: int
    reference_fingerprint: str


@dataclass(frozen=True)
class Evaluation:
    """Measured values. rows and psnr_of: one entry a picture. fingerprint: hash of the prepared pictures."""

    rows: list[int]
    psnr_of: list[float]
    psnr: float
    ssim: float
    lpips: float | None
    usage: Usage
    frechet: Frechet | None
    unusable: Counter[str] = field(default_factory=Counter)
    fingerprint: str = ""


def choose_rows(total: int, num_images: int | None, seed: int, option: str = "--num-images") -> list[int]:
    """`num_images` of `total` row numbers without replacement, in their order; all of them for None.

    UserError for fewer than one or for more than there are.
    """
    if num_images is None:
        return list(range(total))
    if not 1 <= num_images <= total:
        raise UserError(f"{option} {num_images}: give 1 to {total:,}, the rows there are, or leave it out for all")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:num_images].tolist())


def preparation(tokenizer: ImageTokenizer, extractor: FeatureExtractor | None) -> Preparation:
    """How pictures are made ready for this tokenizer and these features."""
    name, digest, resize = (extractor.name, extractor.weights_hash, extractor.resize) if extractor else ("none", "", "")
    return Preparation(name, digest, resize, tokenizer.config.resolution, RESIZE, CROP)


def evaluate_tokenizer(tokenizer: ImageTokenizer, source: CaptionedImages, options: EvaluationOptions) -> Evaluation:
    """Measure a tokenizer on a seeded sample of a source; nothing but the sample depends on the seed.

    UserError if the tokenizer's pictures are too small for a metric or the sample is larger than the source; DataError if no
    picture, or for a Frechet distance only one, is usable.
    """
    side, extractor = tokenizer.config.resolution, options.extractor
    _check_side(side, options.lpips)
    rows = choose_rows(len(source), options.num_images, options.seed)
    unusable: Counter[str] = Counter()
    counts = torch.zeros(tokenizer.codebook_size, dtype=torch.int64)  # [K]
    hashed = PictureHash(preparation(tokenizer, extractor))
    real, rebuilt = (Moments(extractor.dimensions if extractor else 0) for _ in range(2))
    kept: list[int] = []
    psnrs, ssims, distances = [], [], []
    for batch in reconstructed_batches(tokenizer, source, rows, options.batch_size, unusable):
        kept += batch.rows
        hashed.update(batch.original)
        counts += torch.bincount(batch.codes.flatten().cpu(), minlength=len(counts))
        psnrs.append(psnr(batch.reconstruction, batch.original))
        ssims.append(ssim(batch.reconstruction, batch.original))
        if options.lpips is not None:
            distances.append(_lpips(options.lpips, batch.original, batch.reconstruction))
        if extractor is not None:
            rebuilt.update(extractor(batch.reconstruction))
            if options.reference is None:
                real.update(extractor(batch.original))
    if not kept:
        raise DataError("no usable picture to measure reconstruction on")
    values = torch.cat(psnrs)
    return Evaluation(
        rows=kept, psnr_of=values.tolist(), psnr=float(values.mean()), ssim=float(torch.cat(ssims).mean()),
        lpips=float(torch.cat(distances).mean()) if distances else None, usage=usage_of_counts(counts),
        frechet=(measure_frechet(real, rebuilt, options.reference, hashed, preparation(tokenizer, extractor))
                 if extractor else None),
        unusable=unusable, fingerprint=hashed.hexdigest())


def _check_side(side: int, lpips: LPIPS | None) -> None:
    if side < WINDOW:
        raise UserError(f"the tokenizer's pictures have {side} pixels on a side; SSIM needs {WINDOW} or more")
    if lpips is not None and side < lpips.smallest:
        raise UserError(f"the tokenizer's pictures have {side} pixels on a side; LPIPS with {lpips.network} needs "
                        f"{lpips.smallest} or more: choose another --lpips, or none")


@torch.no_grad()
def _lpips(network: LPIPS, original: Tensor, reconstruction: Tensor) -> Tensor:
    """LPIPS [B] in float64 of two uint8 [B, S, S, 3]."""
    step = max(1, LPIPS_PIXELS_AT_ONCE // original[0, :, :, 0].numel())
    device = network.shift.device
    parts = [network(pixels_to_float(a).to(device), pixels_to_float(b).to(device))
             for a, b in zip(original.split(step), reconstruction.split(step), strict=True)]
    return torch.cat(parts).double().cpu()


def measure_frechet(real: Moments, other: Moments, reference: ReferenceStatistics | None, hashed: PictureHash,
                    made: Preparation) -> Frechet:
    """Distance of `other` from the reference; without one, from the `real` pictures, which `hashed` and `made` describe."""
    measured = None
    if reference is None:
        reference = measured = ReferenceStatistics(real.mean, real.covariance(), real.count, made, hashed.hexdigest())
    distance = frechet_distance(reference.mean, reference.covariance, other.mean, other.covariance())
    too_few = min(reference.count, other.count) <= len(other.mean)
    return Frechet(distance, too_few, other.count, measured, reference.count, reference.fingerprint)
