"""`evaluate_generator`: measure a text-to-image model; report all that the numbers depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from inference import SamplingParams, TextToImage
from seq2seq import ClassLabels
from tokenizer_image.fingerprint import code_fingerprint
from tokenloom_common.devices import choose_device
from tokenloom_common.errors import UserError, choose
from tokenloom_common.files import atomic_folder, write_json_atomic
from tokenloom_common.pretrained import WEIGHTS_NAME, resolve_folder
from training.config.encoding import LayoutConfig
from training.data.sources.captioned_images import CaptionedImages
from training.data.sources.open_dataset import open_dataset
from training.evaluation.generator import (
    Diversity,
    alignment_metrics,
    diversity,
    generator_frechet,
    image_retrieval,
    observe_samples,
)
from training.evaluation.headline import curve_panels, headline, loss_headline
from training.evaluation.image_metrics.features import EXTRACTORS, sha256
from training.evaluation.image_metrics.frechet import CROP, RESIZE, frechet_section
from training.evaluation.observations import Observations
from training.evaluation.options import (
    GENERATOR_COMMAND,
    EvaluationTarget,
    GeneratorEvaluationOptions,
)
from training.evaluation.plots import plot_lines
from training.evaluation.questions import Question, choose_questions
from training.evaluation.real_images import RealImages, measure_real_images
from training.evaluation.report_files import (
    default_split,
    package_versions,
    reproducible_cudnn,
)
from training.evaluation.report_place import (
    CURVE_NAME,
    GENERATOR_FILES,
    GENERATOR_SHEET,
    REPORT_NAME,
    check_generator_place,
)
from training.evaluation.scorers import Scorers, load_scorers
from training.evaluation.sheets import labelled_grid

SCHEMA_VERSION = 1
DEFAULT_CAPTIONS = 500
DEFAULT_DIVERSITY_CAPTIONS = 16
DEFAULT_DIVERSITY_IMAGES = 4  # of each of these captions
DEFAULT_LAYOUT_COLUMN = LayoutConfig().column
SAMPLING_FIELDS = ("guidance_schedule", "guidance_power", "guidance_end", "top_k", "temperature",
                   "top_p", "min_p")


def evaluate_generator(model: str | Path, data: str | Path,
                       options: GeneratorEvaluationOptions | None = None, *,
                       split: str | None = None, device: str | None = None,
                       out: str | Path | None = None) -> dict[str, Any]:
    """Sample a text-to-image model on the captions of a split; return the report of the images.

    model: a model folder or hub id. data: folder, parquet file, tar shards or hub id of captioned
    images. split None: train, or the only one; choose one that the model was not trained on.
    device: such as "cpu" or "cuda:1"; None: the GPU when there is one.
    out: folder for report.json, contact_sheet.png and, with several guidance scales, guidance.png,
        replaced as a whole; None: nothing is written.

    The report is the content of report.json. `report["metrics"]` maps name to {"value", "unit"}:
    the loss in nats per token on the data's own images, and with one guidance scale the numbers of
    the generated ones; with several, `report["generated"]` has an entry per scale.

    UserError for a wrong model, data, option or `out`, before anything is sampled; DataError (a
    UserError) if fewer than two of the data's images can be read.
    """
    options = options or GeneratorEvaluationOptions()
    out_name = None if out is None else str(out)
    target = EvaluationTarget(str(model), str(data), split, device, out_name)
    chosen_device = choose_device(device)
    if out is not None:
        check_generator_place(out)
    choose({**EXTRACTORS, "none": None}, options.features, "feature extractor")

    pipeline = TextToImage.from_pretrained(target.model, chosen_device,
                                           text_encoder=options.text_encoder)
    # the loss is measured on real images, so a decoder alone will not do
    pipeline.image_tokenizer.config.check_encodes(target.model)
    settings = _sampling_settings(options, pipeline.default_params)
    source = open_dataset(target.data, split=split, **options.reading)
    questions = _questions(pipeline, source, options)
    scorers = load_scorers(options, target.data, pipeline, questions, chosen_device)
    # the loss needs no sampling, so that it is the same at every scale
    if len(settings) > 1 and not scorers.any:
        raise UserError("several --guidance scales, but nothing looks at the pictures; give "
                        "--matcher, --nearest-split or --features")

    with reproducible_cudnn():
        layout_column = options.layout_column or DEFAULT_LAYOUT_COLUMN
        real = measure_real_images(pipeline, source, questions, scorers, options.batch_size,
                                   layout_column)
        runs = [_sample(pipeline, real, params, scorers, options) for params in settings]
    report = _report(target, options, pipeline, source, real, scorers, runs)
    if out is not None:
        _write(Path(out), report, real, runs)
    return report


@dataclass(frozen=True)
class SamplingRun:
    """Results at one setting of sampling. metrics: as in the report."""

    params: SamplingParams
    observations: Observations
    metrics: dict[str, Any]
    diversity: Diversity | None


# ---- before anything slow ----

def _sampling_settings(options: GeneratorEvaluationOptions,
                       defaults: SamplingParams) -> list[SamplingParams]:
    """Return the model folder's sampling with the options' changes, once per guidance scale."""
    changes = {name: getattr(options, name) for name in SAMPLING_FIELDS}
    scales: Sequence[float | None] = options.guidance or [None]  # None: the folder's own scale
    settings = []
    for scale in scales:
        given = {"guidance_scale": scale, **changes}
        known = {name: value for name, value in given.items() if value is not None}
        settings.append(SamplingParams.parse({**defaults.plain(), **known}, "sampling options"))
    return settings


def _questions(model: TextToImage, source: CaptionedImages,
               options: GeneratorEvaluationOptions) -> list[Question]:
    """Choose the captions to sample. UserError for classes or layouts that the model has not."""
    # a class model knows only a row's first caption, which names its class
    by_class = model.text_tokenizer.kind == ClassLabels.kind
    count = options.num_captions or min(DEFAULT_CAPTIONS, len(source))
    questions = choose_questions(source, count, options.seed, first_caption=by_class)
    if by_class:  # an unknown class is refused now, not when its image is sampled
        model.text_tokenizer.encode([question.caption for question in questions])

    if options.layout_column is not None and model.seq2seq.config.layout_kind != "classes":
        raise UserError(f"--layout-column {options.layout_column}: this model has no layout of "
                        "classes; leave it out")
    return questions


# ---- sampling ----

def _sample(model: TextToImage, real: RealImages, params: SamplingParams, scorers: Scorers,
            options: GeneratorEvaluationOptions) -> SamplingRun:
    """Sample every question at one setting, and measure the images."""
    questions = real.questions
    observations = observe_samples(model, questions, params, scorers, options.batch_size)
    metrics = alignment_metrics(observations, questions, scorers, options.seed)
    if scorers.extractor is None:
        return SamplingRun(params, observations, metrics, None)

    metrics["picture_retrieval"] = image_retrieval(observations, real.observations, questions)
    frechet = generator_frechet(observations, real, model, scorers)
    fingerprint = real.image_hash.hexdigest()
    # each scale has its own section here, so the distance stands in it
    metrics["frechet"] = {"distance": frechet.distance,
                          **frechet_section(scorers.extractor, frechet, fingerprint)}

    captions = _or_default(options.diversity_captions, DEFAULT_DIVERSITY_CAPTIONS)
    images = _or_default(options.diversity_images, DEFAULT_DIVERSITY_IMAGES)
    if captions == 0:  # --diversity-captions 0
        return SamplingRun(params, observations, metrics, None)
    varied = diversity(model, questions[:captions], images, params, scorers.extractor,
                       options.batch_size)
    metrics["diversity"] = {"captions": varied.captions, "images": varied.images,
                            "within": varied.within, "between": varied.between,
                            "features": scorers.extractor.name}
    return SamplingRun(params, observations, metrics, varied)


def _or_default(value: int | None, default: int) -> int:
    return default if value is None else value


# ---- files ----

def _report(target: EvaluationTarget, options: GeneratorEvaluationOptions, model: TextToImage,
            source: CaptionedImages, real: RealImages, scorers: Scorers,
            runs: list[SamplingRun]) -> dict[str, Any]:
    metrics = loss_headline(real.loss)
    if len(runs) == 1:  # with several scales there is no one number; see "generated"
        metrics |= headline(runs[0].metrics)
    matcher = None
    if options.matcher is not None:
        matcher = {"folder": str(options.matcher), "weights_sha256": _hashes(options.matcher)}
    return {
        "command": GENERATOR_COMMAND,
        "schema_version": SCHEMA_VERSION,
        "metrics": metrics,
        "loss": {
            "pictures": real.loss.pictures,
            "given_caption": real.loss.loss,
            "given_no_caption": real.loss.loss_without_caption,
            # five digits, as in validation.json: there may be thousands of positions
            "by_position": [round(value, 5) for value in real.loss.by_position],
        },
        "generated": [{"sampling": run.params.plain(), **run.metrics} for run in runs],
        "real": alignment_metrics(real.observations, real.questions, scorers, options.seed),
        "model": _model_section(target, model),
        "matcher": matcher,
        "data": _data_section(target, source, real, options.reading),
        "options": _options_section(target, options),
        "device": str(model.device),
        "versions": package_versions(),
        "questions": [question._asdict() for question in real.questions],
    }


def _model_section(target: EvaluationTarget, model: TextToImage) -> dict[str, Any]:
    return {
        "folder": target.model,
        "weights_sha256": _hashes(target.model),
        "kind": model.seq2seq.kind,
        "parameters": sum(p.numel() for p in model.seq2seq.parameters()),
        "text": model.text_tokenizer.kind,
        "code_fingerprint": code_fingerprint(model.image_tokenizer),
        "resolution": model.image_tokenizer.config.resolution,
    }


def _data_section(target: EvaluationTarget, source: CaptionedImages, real: RealImages,
                  reading: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "path": target.data,
        "split": target.split or default_split(target.data, **reading),
        "rows": len(source),
        "left_out_when_opened": dict(source.dropped),
        "captions": len(real.questions),
        "concepts": len({question.concept for question in real.questions}),
        "unusable": dict(real.unusable),
        "fingerprint": real.image_hash.hexdigest(),
        "resize": RESIZE,
        "crop": CROP,
        "pixels": "8-bit RGB",
    }


def _options_section(target: EvaluationTarget,
                     options: GeneratorEvaluationOptions) -> dict[str, Any]:
    """Every option of the command by name, so that the run can be repeated."""
    section = {}
    for name, value in sorted({**vars(target), **vars(options)}.items()):
        section[name] = str(value) if isinstance(value, Path) else value
    return section


def _hashes(folder_or_hub_id: str | Path) -> dict[str, str]:
    """Every weights file below a folder -> its sha256."""
    folder = resolve_folder(str(folder_or_hub_id))
    paths = sorted(folder.rglob(f"*{Path(WEIGHTS_NAME).suffix}"))  # *.safetensors
    return {str(path.relative_to(folder)): sha256(path) for path in paths}


def _write(out: Path, report: dict[str, Any], real: RealImages, runs: list[SamplingRun]) -> None:
    with atomic_folder(out.resolve(), GENERATOR_FILES) as folder:
        write_json_atomic(folder / REPORT_NAME, report)
        _sheet(real, runs).save(folder / GENERATOR_SHEET, format="PNG")
        if len(runs) > 1:
            scales = [run.params.guidance_scale for run in runs]
            panels = curve_panels([run.metrics for run in runs])
            plot_lines("guidance scale", scales, panels, folder / CURVE_NAME)


def _sheet(real: RealImages, runs: list[SamplingRun]) -> Image.Image:
    """The same captions at each setting, the data's own images, and several of single captions."""
    captions = [question.caption for question in real.questions]
    sections = []
    for run in runs:
        title = f"generated, guidance {run.params.guidance_scale:g}"
        # not strict: only the first images were kept
        sections.append((title, list(zip(captions, run.observations.shown, strict=False))))
    sections.append(("the data's own pictures",
                     list(zip(captions, real.observations.shown, strict=False))))

    first = runs[0]
    if first.diversity is not None:
        cells = []
        for caption, images in first.diversity.shown:
            cells += [(caption, image) for image in images]
        sections.append((f"several of one caption, guidance {first.params.guidance_scale:g}",
                         cells))
    return labelled_grid(sections)
