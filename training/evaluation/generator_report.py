"""`tokenloom evaluate generator` from its options to its files: report.json, contact_sheet.png and, with several guidance
scales, guidance.png."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from inference import SamplingParams, TextToImage
from inference.commands.options import choose_device, given_params
from inference.scoring.matcher_folder import load_matcher
from seq2seq import ClassLabels
from tokenizer_image.fingerprint import code_fingerprint
from tokenloom_common.errors import UserError, choose
from tokenloom_common.files import atomic_folder, write_json_atomic
from tokenloom_common.pretrained import WEIGHTS_NAME, resolve_folder
from training.commands.evaluate import GENERATOR_COMMAND as COMMAND
from training.config.encoding import LayoutConfig
from training.data.sources.captioned_images import CaptionedImages
from training.data.sources.open_dataset import open_dataset
from training.evaluation.features import EXTRACTORS, load_extractor, sha256
from training.evaluation.generator import (
    Diversity,
    Judges,
    Looked,
    Real,
    diversity,
    frechet,
    judge,
    look_at_samples,
    measure_real,
    picture_retrieval,
)
from training.evaluation.plots import plot_lines
from training.evaluation.questions import Question, choose_questions
from training.evaluation.reconstruction import CROP, RESIZE, preparation
from training.evaluation.reference import check_reference, load_reference
from training.evaluation.report_files import (
    REPORT_NAME,
    check_out,
    default_split,
    frechet_section,
    package_versions,
)
from training.evaluation.retrieval import TOP
from training.evaluation.scenes.captions import parse_caption
from training.evaluation.scenes.reader import LARGEST, SMALLEST
from training.evaluation.sheets import labelled_grid

SCHEMA_VERSION = 1
SHEET_NAME, CURVE_NAME = "contact_sheet.png", "guidance.png"
OWN_FILES = (REPORT_NAME, SHEET_NAME, CURVE_NAME)
DEFAULT_CAPTIONS = 500
DEFAULT_DIVERSITY = (16, 4)  # captions, pictures of each
DEFAULT_LAYOUT_COLUMN = LayoutConfig().column


def run_generator_evaluation(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, write OUT whole, and return the report. `args` are those of `tokenloom evaluate generator`, checked."""
    device, out = choose_device(args.device), Path(args.out)
    check_out(out, OWN_FILES, COMMAND)
    choose({**EXTRACTORS, "none": None}, args.features, "feature extractor")
    model = TextToImage.from_pretrained(args.model, device, text_encoder=args.text_encoder)
    model.image_tokenizer.config.check_encodes(args.model)  # captions are measured on real pictures too
    settings = [given_params(args, model.default_params, guidance=scale) for scale in args.guidance or [None]]
    source = open_dataset(args.data, split=args.split)
    questions = choose_questions(source, args.num_captions or min(DEFAULT_CAPTIONS, len(source)), args.seed,
                                 model.text_tokenizer.kind == ClassLabels.kind)
    if model.text_tokenizer.kind == ClassLabels.kind:
        model.text_tokenizer.encode([question.caption for question in questions])  # an unknown class is refused now
    if args.layout_column is not None and model.seq2seq.config.layout_kind != "classes":
        raise UserError(f"--layout-column {args.layout_column}: this model has no layout of classes; leave it out")
    judges = _judges(args, model, questions, device)
    if len(settings) > 1 and not judges.any:
        raise UserError("several --guidance scales, but nothing looks at the pictures; give --matcher or --features")
    # what is global and changes digits on a GPU: convolutions in TF32, and the choice of algorithm by timing
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        real = measure_real(model, source, questions, judges, args.batch_size, args.layout_column or DEFAULT_LAYOUT_COLUMN)
        runs = [_run(model, real, params, judges, args) for params in settings]
    report = _report(args, model, source, real, judges, runs)
    with atomic_folder(out.resolve(), OWN_FILES) as folder:
        write_json_atomic(folder / REPORT_NAME, report)
        _sheet(real, runs).save(folder / SHEET_NAME, format="PNG")
        if len(runs) > 1:
            plot_lines("guidance scale", [run.params.guidance_scale for run in runs], _curves(runs), folder / CURVE_NAME)
    return report


@dataclass(frozen=True)
class Run:
    """What was found at one setting of sampling."""

    params: SamplingParams
    looked: Looked
    found: dict[str, Any]
    varied: Diversity | None


def _judges(args: argparse.Namespace, model: TextToImage, questions: Sequence[Question], device: str) -> Judges:
    matcher = None if args.matcher is None else load_matcher(args.matcher, device)
    extractor = None if args.features == "none" else load_extractor(args.features, args.inception_weights, device)
    reference = None
    if args.reference is not None and extractor is not None:
        reference = load_reference(args.reference)
        check_reference(reference, preparation(model.image_tokenizer, extractor), extractor.dimensions, args.reference)
    side = model.image_tokenizer.config.resolution
    readable = SMALLEST <= side <= LARGEST
    if args.composition == "yes" and not readable:
        raise UserError(f"--composition yes: scenes of {SMALLEST} to {LARGEST} pixels can be read, this model's have {side}")
    reads_scenes = args.composition == "yes" or (args.composition == "auto" and readable and _is_shapes_data(args.data))
    if reads_scenes:
        for question in questions:
            parse_caption(question.caption)  # before anything slow
    return Judges(matcher, extractor, reads_scenes, reference)


def _is_shapes_data(path: str) -> bool:
    """Whether a folder was built by `tokenloom data shapes`."""
    try:
        return bool(json.loads((Path(path) / "build.json").read_text(encoding="utf-8"))["builder"] == "shapes")
    except (OSError, ValueError, TypeError, LookupError):
        return False


def _run(model: TextToImage, real: Real, params: SamplingParams, judges: Judges, args: argparse.Namespace) -> Run:
    looked = look_at_samples(model, real.questions, params, judges, args.batch_size)
    found, varied = judge(looked, real.questions, judges, args.seed), None
    if judges.extractor is not None:
        found["picture_retrieval"] = picture_retrieval(looked, real.looked, real.questions)
        measured = frechet(looked, real, model, judges)
        found["frechet"] = {"distance": measured.distance,
                            **frechet_section(judges.extractor, measured, real.hashed.hexdigest())}
        captions, images = (default if given is None else given for given, default in zip(
            (args.diversity_captions, args.diversity_images), DEFAULT_DIVERSITY, strict=True))
        if captions:
            varied = diversity(model, real.questions[:captions], images, params, judges.extractor, args.batch_size)
            found["diversity"] = {"captions": varied.captions, "images": varied.images, "within": varied.within,
                                  "between": varied.between, "features": judges.extractor.name}
    return Run(params, looked, found, varied)


# ---- files ----

def _report(args: argparse.Namespace, model: TextToImage, source: CaptionedImages, real: Real, judges: Judges,
            runs: list[Run]) -> dict[str, Any]:
    return {
        "command": COMMAND, "schema_version": SCHEMA_VERSION,
        "metrics": {**_loss_metrics(real), **(headline(runs[0].found) if len(runs) == 1 else {})},
        "loss": {"pictures": real.loss.pictures, "given_caption": real.loss.loss,
                 "given_no_caption": real.loss.loss_without_caption,
                 "by_position": [round(value, 5) for value in real.loss.by_position]},
        "generated": [{"sampling": run.params.plain(), **run.found} for run in runs],
        "real": judge(real.looked, real.questions, judges, args.seed),
        "model": _model(args, model),
        "matcher": None if args.matcher is None else {"folder": str(args.matcher), "weights_sha256": _hashes(args.matcher)},
        "data": {
            "path": str(args.data), "split": args.split or default_split(args.data), "rows": len(source),
            "left_out_when_opened": dict(source.dropped), "captions": len(real.questions),
            "concepts": len({question.concept for question in real.questions}), "unusable": dict(real.unusable),
            "fingerprint": real.hashed.hexdigest(), "resize": RESIZE, "crop": CROP, "pixels": "8-bit RGB"},
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in sorted(vars(args).items())},
        "device": str(model.device),
        "versions": package_versions(),
        "questions": [question._asdict() for question in real.questions],
    }


def _model(args: argparse.Namespace, model: TextToImage) -> dict[str, Any]:
    return {
        "folder": str(args.model), "weights_sha256": _hashes(args.model), "kind": model.seq2seq.kind,
        "parameters": sum(p.numel() for p in model.seq2seq.parameters()), "text": model.text_tokenizer.kind,
        "code_fingerprint": code_fingerprint(model.image_tokenizer), "resolution": model.image_tokenizer.config.resolution}


def _hashes(name: str) -> dict[str, str]:
    """Every weights file below a folder -> its hash."""
    folder = resolve_folder(name)
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob(f"*{Path(WEIGHTS_NAME).suffix}"))}


def _loss_metrics(real: Real) -> dict[str, dict[str, Any]]:
    loss = real.loss
    values = {"loss": (loss.loss, "nats a token"), "perplexity": (math.exp(loss.loss), "codes"),
              "loss_without_caption": (loss.loss_without_caption, "nats a token")}
    return {name: {"value": value, "unit": unit} for name, (value, unit) in values.items()}


def headline(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The numbers of one run, flat, by name: value and unit, in the order of stdout."""
    values: dict[str, tuple[float | None, str]] = {}
    if "matcher_score" in found:
        values["matcher_score"] = (found["matcher_score"],
                                   f"(cosine; {found['matcher_score_shuffled']:.4f} with other captions)")
        for top in TOP:
            values[f"retrieval_top{top}"] = (found["retrieval"][f"top{top}"],
                                             f"of pictures (chance {found['retrieval'][f'chance_top{top}']:.4f})")
    if "picture_retrieval" in found:
        near = found["picture_retrieval"]
        values["picture_retrieval_top1"] = (near["top1"], f"of pictures (chance {near['chance']:.4f})")
        values[found["frechet"]["metric"]] = (found["frechet"]["distance"], "(squared distance, 0 = equal)")
    if "diversity" in found:
        values["diversity"] = (found["diversity"]["within"], f"(cosine distance within a caption; "
                               f"{_share(found['diversity']['between'])} between concepts)")
    if "composition" in found:
        shown, by_chance = found["composition"], found["composition_shuffled"]
        parts = {"composition": (shown["all"], by_chance["all"])}
        parts |= {f"composition_{kind.replace(' ', '_')}": (shown["kinds"][kind]["all"], by_chance["kinds"][kind]["all"])
                  for kind in shown["kinds"]}
        parts |= {f"composition_part_{part}": (shown[part], by_chance[part])
                  for part in ("color", "shape", "count", "relation")}
        values |= {name: (own["share"], f"of {own['captions']} pictures ({_share(other['share'])} with other captions)")
                   for name, (own, other) in parts.items() if own["captions"]}
    return {name: {"value": value, "unit": unit} for name, (value, unit) in values.items()}


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _curves(runs: list[Run]) -> list[tuple[str, dict[str, list[float]]]]:
    """Panels of guidance.png: all shares in one, each other number in its own."""
    found = [headline(run.found) for run in runs]
    curves = {name: [float(each[name]["value"]) for each in found] for name in found[0]}
    shares = {name: values for name, values in curves.items()
              if "retrieval" in name or (name.startswith("composition") and "part" not in name)}
    rest = {name: values for name, values in curves.items() if name not in shares and "part" not in name}
    return [*([("share of pictures", shares)] if shares else []), *[(name, {name: values}) for name, values in rest.items()]]


def _sheet(real: Real, runs: list[Run]) -> Image.Image:
    """The same captions at each setting, the data's own pictures below them, and several pictures of single captions."""
    captions = [question.caption for question in real.questions]
    rows = [(f"generated, guidance {run.params.guidance_scale:g}", list(zip(captions, run.looked.shown, strict=False)))
            for run in runs]
    rows.append(("the data's own pictures", list(zip(captions, real.looked.shown, strict=False))))
    if runs[0].varied is not None:
        rows.append((f"several of one caption, guidance {runs[0].params.guidance_scale:g}",
                     [(caption, image) for caption, images in runs[0].varied.shown for image in images]))
    return labelled_grid(rows)
