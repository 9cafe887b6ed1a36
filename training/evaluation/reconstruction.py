"""Reconstruction quality of an image tokenizer: the loop over images and its metrics."""

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
from training.evaluation.image_metrics.features import FeatureExtractor
from training.evaluation.image_metrics.frechet import Frechet, measure_frechet, preparation
from training.evaluation.image_metrics.image_spread import ImageSpread
from training.evaluation.image_metrics.pixel_metrics import WINDOW, Moments, psnr, ssim
from training.evaluation.image_metrics.reference import ImageHash, ReferenceStatistics

LPIPS_PIXELS_AT_ONCE = 1 << 20  # its VGG16 keeps 64 channels at full size for both images


class ReconstructedBatch(NamedTuple):
    """Images before and after the tokenizer.

    rows: their places in the source. original, reconstruction: uint8 [B, S, S, 3] on the CPU.
    codes: [B, h, w].
    """

    rows: list[int]
    original: Tensor
    reconstruction: Tensor
    codes: Tensor


def reconstructed_batches(tokenizer: ImageTokenizer, source: CaptionedImages, rows: Sequence[int],
                          batch_size: int, unusable: Counter[str],
                          quiet: bool = False) -> Iterator[ReconstructedBatch]:
    """Encode and decode rows of a source.

    Images that cannot be read are skipped and counted by reason in `unusable`.
    """
    device = next(tokenizer.parameters()).device
    starts = range(0, len(rows), batch_size)
    for start in progress(starts, "measure reconstruction", unit="batch", quiet=quiet):
        kept = []
        pixels = []
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
        # in 8 bits, as images are saved and shown
        reconstruction = float_to_pixels(tokenizer.decode(codes)).cpu()
        yield ReconstructedBatch(kept, original, reconstruction, codes)


def _count_codes(codes: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs: [K] int64 on the CPU."""
    return torch.bincount(codes.flatten().cpu(), minlength=codebook_size)


def _empty_spread(tokenizer: ImageTokenizer) -> ImageSpread:
    return ImageSpread(tokenizer.config.resolution, tokenizer.config.resolution)


def _add_to_spread(spread: ImageSpread, batch: ReconstructedBatch) -> None:
    spread.update(pixels_to_float(batch.original), pixels_to_float(batch.reconstruction))


def evaluate_reconstruction(tokenizer: ImageTokenizer, source: CaptionedImages,
                            batch_size: int = 64, quiet: bool = False) -> dict[str, Any]:
    """Return mean PSNR in dB (8-bit RGB at the tokenizer's resolution) and codebook usage.

    And `reconstruction_spread` where images differ (ImageSpread.kept). DataError if no image is
    usable.
    """
    unusable: Counter[str] = Counter()
    code_counts = torch.zeros(tokenizer.codebook_size, dtype=torch.int64)  # [K]
    spread = _empty_spread(tokenizer)
    psnrs = []
    rows = range(len(source))
    for batch in reconstructed_batches(tokenizer, source, rows, batch_size, unusable, quiet):
        code_counts += _count_codes(batch.codes, len(code_counts))
        psnrs.append(psnr(batch.reconstruction, batch.original))
        _add_to_spread(spread, batch)
    if not psnrs:
        raise DataError("no usable picture to measure reconstruction on")

    values = torch.cat(psnrs)
    usage = usage_of_counts(code_counts)
    report = {"psnr": float(values.mean()), "pictures": len(values), "unusable": unusable.total(),
              "codebook_usage": usage.usage, "codebook_perplexity": usage.perplexity}
    kept = spread.kept()
    return report if kept is None else report | {"reconstruction_spread": kept}


@dataclass(frozen=True)
class ReconstructionOptions:
    """Which images to measure, and with which networks.

    num_images None: every row. lpips, extractor None: that metric is left out.
    reference: statistics to measure the Frechet distance against, instead of the originals'.
    """

    num_images: int | None = None
    seed: int = 0
    batch_size: int = 64
    lpips: LPIPS | None = None
    extractor: FeatureExtractor | None = None
    reference: ReferenceStatistics | None = None


@dataclass(frozen=True)
class ReconstructionMetrics:
    """Measured values.

    rows, psnr_per_image: one entry per image. spread: ImageSpread.kept, None if images do not
    differ. fingerprint: hash of the images.
    """

    rows: list[int]
    psnr_per_image: list[float]
    psnr: float
    ssim: float
    lpips: float | None
    spread: float | None
    usage: Usage
    frechet: Frechet | None
    unusable: Counter[str] = field(default_factory=Counter)
    fingerprint: str = ""


def choose_rows(total: int, num_images: int | None, seed: int,
                option: str = "--num-images") -> list[int]:
    """Draw `num_images` of `total` row numbers without replacement, sorted; None: all of them.

    UserError for fewer than one or for more than there are.
    """
    if num_images is None:
        return list(range(total))
    if not 1 <= num_images <= total:
        raise UserError(f"{option} {num_images}: give 1 to {total:,}, the rows there are, or leave "
                        "it out for all")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(total, generator=generator)
    # a larger sample of the same seed contains a smaller one; sorted, to read in the data's order
    return sorted(order[:num_images].tolist())


def measure_reconstruction(tokenizer: ImageTokenizer, source: CaptionedImages,
                           options: ReconstructionOptions) -> ReconstructionMetrics:
    """Measure a tokenizer on a seeded sample of a source; only the sample depends on the seed.

    UserError if the tokenizer's images are too small for a metric or the sample is larger than
    the source; DataError if no image, or for a Frechet distance only one, is usable.
    """
    extractor = options.extractor
    _check_resolution(tokenizer.config.resolution, options.lpips)  # before any work
    rows = choose_rows(len(source), options.num_images, options.seed)

    unusable: Counter[str] = Counter()
    code_counts = torch.zeros(tokenizer.codebook_size, dtype=torch.int64)  # [K]
    prepared = preparation(tokenizer, extractor)
    image_hash = ImageHash(prepared)
    dimensions = extractor.dimensions if extractor else 0
    original_moments = Moments(dimensions)
    reconstruction_moments = Moments(dimensions)
    spread = _empty_spread(tokenizer)
    kept: list[int] = []
    psnrs, ssims, lpips_values = [], [], []  # [B] of each batch
    for batch in reconstructed_batches(tokenizer, source, rows, options.batch_size, unusable):
        kept += batch.rows
        image_hash.update(batch.original)
        code_counts += _count_codes(batch.codes, len(code_counts))
        psnrs.append(psnr(batch.reconstruction, batch.original))
        ssims.append(ssim(batch.reconstruction, batch.original))
        _add_to_spread(spread, batch)
        if options.lpips is not None:
            lpips_values.append(_lpips(options.lpips, batch.original, batch.reconstruction))
        if extractor is not None:
            reconstruction_moments.update(extractor(batch.reconstruction))
            # a reference takes the originals' place, and their features are half of the work
            if options.reference is None:
                original_moments.update(extractor(batch.original))
    if not kept:
        raise DataError("no usable picture to measure reconstruction on")

    frechet = None
    if extractor is not None:
        frechet = measure_frechet(original_moments, reconstruction_moments, options.reference,
                                  image_hash, prepared)
    # means over images, not over batches, of which the last may be smaller
    all_psnrs = torch.cat(psnrs)
    return ReconstructionMetrics(
        rows=kept, psnr_per_image=all_psnrs.tolist(), psnr=float(all_psnrs.mean()),
        ssim=float(torch.cat(ssims).mean()),
        lpips=float(torch.cat(lpips_values).mean()) if lpips_values else None,
        spread=spread.kept(), usage=usage_of_counts(code_counts), frechet=frechet,
        unusable=unusable, fingerprint=image_hash.hexdigest())


def _check_resolution(side: int, lpips: LPIPS | None) -> None:
    if side < WINDOW:
        raise UserError(f"the tokenizer's pictures have {side} pixels on a side; SSIM needs "
                        f"{WINDOW} or more")
    if lpips is not None and side < lpips.smallest:
        raise UserError(f"the tokenizer's pictures have {side} pixels on a side; LPIPS with "
                        f"{lpips.network} needs {lpips.smallest} or more: choose another --lpips, "
                        "or none")


@torch.no_grad()
def _lpips(network: LPIPS, original: Tensor, reconstruction: Tensor) -> Tensor:
    """LPIPS [B] in float64 between two batches of uint8 images [B, S, S, 3]."""
    side = original.shape[1]
    images_at_once = max(1, LPIPS_PIXELS_AT_ONCE // side**2)
    device = network.shift.device
    parts = []
    for some, others in zip(original.split(images_at_once), reconstruction.split(images_at_once),
                            strict=True):
        image = pixels_to_float(some).to(device)
        other = pixels_to_float(others).to(device)
        parts.append(network(image, other))
    return torch.cat(parts).double().cpu()  # float64, for means over many images
