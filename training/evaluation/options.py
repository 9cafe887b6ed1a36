"""Options of `evaluate_tokenizer` and `evaluate_generator`, checked when they are made.

Messages name a field as the command line does (`num_images` is --num-images). Nothing slow is
imported here, so that a wrong option is refused before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenloom_common.errors import UserError

TOKENIZER_COMMAND = "evaluate tokenizer"  # names the report's kind, in report.json too
GENERATOR_COMMAND = "evaluate generator"
MAX_SEED = 2**63 - 1  # as in inference.requests: seeds of images are int64
SEEDS_PER_RUN = 2**32  # image k of a run is drawn with seed + k
COMPOSITION_CHOICES = ("auto", "yes", "no")


@dataclass(frozen=True)
class EvaluationTarget:
    """Inputs and output of an evaluation, as the caller named them; out None: no files."""

    model: str
    data: str
    split: str | None
    device: str | None
    out: str | None


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of both evaluations. UserError for values that cannot be.

    seed: decides the sample. batch_size: images at a time.
    features: network of the Frechet distance, a key of `features.EXTRACTORS`, or "none".
    inception_weights: weights file, for features "inception" alone, which needs it.
    reference: .npz with statistics of real images to measure the Frechet distance against.
    reading: how the data is read; fields of ReadOptions, such as {"format": "classes"}.
    """

    seed: int = 0
    batch_size: int = 64
    features: str = "effnet-lite0"
    inception_weights: str | Path | None = None
    reference: str | Path | None = None
    reading: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # `features` itself is checked later: its table of names imports torch
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: give 1 or more")
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"--seed {self.seed}: give 0 to {MAX_SEED}")
        if self.features == "inception" and self.inception_weights is None:
            raise UserError("--features inception needs --inception-weights FILE: none can be "
                            "shipped or downloaded here")
        if self.inception_weights is not None and self.features != "inception":
            raise UserError(f"--inception-weights is for --features inception, not {self.features}")
        if self.reference is not None and self.features == "none":
            raise UserError("--reference holds features of pictures, and --features none asks "
                            "for none")


@dataclass(frozen=True, kw_only=True)
class TokenizerEvaluationOptions(EvaluationOptions):
    """Options of `evaluate_tokenizer`.

    num_images: size of the seeded sample; None: every row.
    lpips: "alexnet", "vgg16" or "none".
    save_reference: .npz file to save the statistics of the measured originals to.
    """

    num_images: int | None = None
    lpips: str = "alexnet"
    save_reference: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_images is not None and self.num_images < 1:
            raise UserError(f"--num-images {self.num_images}: give 1 or more, or leave it out "
                            "for all")
        if self.reference is not None and self.save_reference is not None:
            raise UserError("--reference and --save-reference: give one; with a reference no "
                            "statistics are made of the pictures")
        if self.save_reference is not None and self.features == "none":
            raise UserError("--save-reference holds features of pictures, and --features none "
                            "asks for none")


@dataclass(frozen=True, kw_only=True)
class GeneratorEvaluationOptions(EvaluationOptions):
    """Options of `evaluate_generator`. Sampling fields left None take the model folder's default.

    num_captions: rows to sample (2 or more); None: 500, or all if there are fewer.
    guidance: guidance scales; everything is sampled once per scale.
    matcher: folder of an image-text scorer (ours, a CLIP or a SigLIP); None: not measured.
    nearest_split: split in which to find the nearest picture of each sampled one; None: not done.
    diversity_captions, diversity_images: captions sampled several times, and how often; 0
        captions: not measured. None: 16 and 4.
    composition: whether to read shapes off the images: "yes", "no", or "auto" for data built by
        `tokenloom data shapes`.
    layout_column: column of layout classes, for models with such a layout.
    text_encoder: folder of the model's frozen text encoder, if it has moved since training.
    """

    num_captions: int | None = None
    guidance: Sequence[float] | None = None
    guidance_schedule: str | None = None
    guidance_power: float | None = None
    guidance_end: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    temperature: float | None = None
    matcher: str | Path | None = None
    nearest_split: str | None = None
    diversity_captions: int | None = None
    diversity_images: int | None = None
    composition: str = "auto"
    layout_column: str | None = None
    text_encoder: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_captions is not None and self.num_captions < 2:
            raise UserError(f"--num-captions {self.num_captions}: give 2 or more, or leave it out")
        if self.seed > MAX_SEED - SEEDS_PER_RUN:
            raise UserError(f"--seed {self.seed}: give at most {MAX_SEED - SEEDS_PER_RUN}; each "
                            "picture adds to it")
        if self.composition not in COMPOSITION_CHOICES:
            raise UserError(f"--composition {self.composition}: give auto, yes or no")

        scales = self.guidance or ()  # results are told apart by their scale
        if len(set(scales)) < len(scales):
            named = " ".join(f"{scale:g}" for scale in scales)
            raise UserError(f"--guidance {named}: names a scale twice")
        self._check_diversity()

    def _check_diversity(self) -> None:
        captions = self.diversity_captions
        images = self.diversity_images
        # 2 or more: concepts are compared with each other too
        if captions is not None and (captions < 0 or captions == 1):
            raise UserError(f"--diversity-captions {captions}: give 2 or more, or 0 for none")
        if images is not None and images < 2:
            raise UserError(f"--diversity-images {images}: give 2 or more, which are compared with "
                            "each other")
        if captions == 0 and images is not None:
            raise UserError(f"--diversity-images {images}: of no captions (--diversity-captions 0)"
                            "; leave one out")
        if self.features == "none" and (captions or images):
            raise UserError("--diversity-captions and --diversity-images compare features, and "
                            "--features none asks for none; leave them out")
