"""Choose sizes, models and the split of the time from data, machine, speed and minutes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tokenloom_common.errors import UserError
from training.autotrain.facts import LONGEST_TEXT, DataFacts, MachineFacts, StartFacts
from training.autotrain.shapes import (
    LARGE_DATA,
    MIDDLE_DATA,
    SMALL_DATA,
    USUAL_WIDTH,
    Shape,
    Speeds,
    choose_shape,
    minutes_text,
)

FLOOR_MINUTES, MOST_MINUTES = 1.0, 86_400
SCRIPTS = 3  # starts of the launcher: image tokenizer, tokens, transformer
REPORT_SHARE = 0.05  # of the minutes, for samples and measurements
LEAST_REPORT_SECONDS = 15.0
SAMPLED, SAMPLING = 30, 4.0  # pictures sampled at least; seconds of one / seconds of a row
COPY_SHARE = 0.15  # of the minutes, at most, for reading the images once
LEAST_TRAINING_SECONDS = 20.0
LEAST_STEPS = 20
SHARE_BOUNDS = (0.25, 0.6)  # of the training time, for the image tokenizer
ENCODING = 0.3  # seconds to encode an image / seconds to learn from it

LEAST_COPIED, MOST_COPIED = 500, 200_000  # images
HELD_OUT_SHARE = 0.05
HELD_OUT_BOUNDS = (10, 500)
MOST_HELD_OUT = 2000  # of the data's own
HELD_OUT_FROM = 100  # images; of fewer none is spared

SMALL_WIDTH, LARGE_WIDTH = 128, 512
WIDTHS = {SMALL_WIDTH: (1, 2), USUAL_WIDTH: (1, 2), LARGE_WIDTH: (6, 12)}
"""Width of the transformer -> layers of its encoder and decoder.

Few layers listen to the caption sooner: of 101 emoji concepts in 140 CPU-seconds, three layers of
width 320 drew 20 % right and six of width 224 10 % (docs/generator.md).
"""


@dataclass(frozen=True)
class Times:
    """Seconds that the stages may take.

    whole: of all, what is lost to starts too. picture_seconds, row_seconds: to learn from one.
    """

    whole: float
    copy: float
    tokenizer: float
    encode: float
    transformer: float
    report: float
    picture_seconds: float
    row_seconds: float


@dataclass(frozen=True)
class Choices:
    """Everything that the scripts' configs follow from.

    images: to train on, of those that are copied. whys: reasons that only the choice knows.
    """

    shape: Shape
    codebook_size: int
    channels: int
    tokenizer_batch: int
    flip: float
    width: int
    dropout: float
    batch: int
    vocabulary: int
    text_length: int
    guidance: float
    temperature: float
    top_k: int
    copied: int
    held_out: int
    images: int
    times: Times
    whys: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def keeps_best(self) -> bool:
        """Whether the checkpoint that does best on held-out images is the result, not the last.

        A few hundred images are learnt by heart: their captions are what the model will be asked.
        """
        return self.images >= SMALL_DATA and self.held_out >= HELD_OUT_BOUNDS[0]

    @property
    def tokenizer_steps(self) -> int:
        """Steps of the image tokenizer at the measured speed."""
        return steps_in(self.times.tokenizer, self.times.picture_seconds * self.tokenizer_batch)

    @property
    def steps(self) -> int:
        """Steps of the transformer at the measured speed."""
        return steps_in(self.times.transformer, self.times.row_seconds * self.batch)


def steps_in(seconds: float, seconds_per_step: float) -> int:
    """Steps that fit into the time, the least where none does."""
    return max(LEAST_STEPS, int(seconds / seconds_per_step))


def check_minutes(minutes: float) -> None:
    """UserError for a time that no model can be made in."""
    if not FLOOR_MINUTES <= minutes <= MOST_MINUTES:  # NaN too
        reason = ("; starting the three programs alone takes most of a minute"
                  if minutes < FLOOR_MINUTES else "")
        raise UserError(f"--minutes {minutes:g}: give {FLOOR_MINUTES:g} to {MOST_MINUTES:,}"
                        f"{reason}")


def choose(data: DataFacts, machine: MachineFacts, seconds: float, speeds: Speeds,
           start: StartFacts | None = None, size: int | None = None) -> Choices:
    """Choose for `seconds` that are left. size: asked for by the user."""
    affordable = int(COPY_SHARE * seconds / max(1e-9, data.read_seconds))  # images to read
    copied, copy_why = _copied(data, affordable)
    held_out = _held_out(data, copied, affordable)
    images = copied - (held_out if data.held_out is None else 0)
    own_held_out = held_out if data.held_out is not None else 0
    copy_seconds = (copied + own_held_out) * data.read_seconds
    report = max(LEAST_REPORT_SECONDS, REPORT_SHARE * seconds)
    fixed = copy_seconds + SCRIPTS * speeds.start_seconds

    shape, shape_why = choose_shape(data, images, seconds - fixed - report, speeds, start, size)
    picture_seconds = speeds.picture(shape)
    encode = copied * picture_seconds * ENCODING
    sampling = SAMPLED * SAMPLING * speeds.row(shape, USUAL_WIDTH)
    report = max(report, speeds.start_seconds / 2 + sampling)
    free = max(LEAST_TRAINING_SECONDS, seconds - fixed - encode - report)
    share = _tokenizer_share(shape, speeds, free)
    width, width_why = _width(shape, images, free * (1 - share), speeds)
    times = Times(seconds, copy_seconds, free * share, encode, free * (1 - share), report,
                  picture_seconds, speeds.row(shape, width))
    choices = Choices(
        shape=shape, codebook_size=_codebook_size(shape, images), channels=channels_of(machine),
        tokenizer_batch=tokenizer_batch(machine), flip=0.5 if images < MIDDLE_DATA else 0.0,
        width=width, dropout=0.0, batch=row_batch(machine), vocabulary=data.vocabulary,
        text_length=min(LONGEST_TEXT, max(8, data.text_ids)),
        **_sampling(shape, images),
        copied=copied, held_out=held_out, images=images, times=times,
        whys={"size": shape_why, "width": width_why, "copy": copy_why})
    epochs = choices.steps * choices.batch / images
    if width == LARGE_WIDTH or (images >= SMALL_DATA and epochs >= 15):
        choices = replace(choices, dropout=0.1)
    return choices


def channels_of(machine: MachineFacts) -> int:
    """First channels of the image tokenizer."""
    return 64 if machine.gpus else 16


def tokenizer_batch(machine: MachineFacts) -> int:
    """Images in a step of the image tokenizer."""
    # on CPUs 8 learned more than 16 at equal images (docs/tokenizers.md)
    return 32 * machine.processes if machine.gpus else 8


def row_batch(machine: MachineFacts) -> int:
    """Rows in a step of the transformer."""
    return 64 * machine.processes if machine.gpus else 16


# ---- one choice each

def _copied(data: DataFacts, affordable: int) -> tuple[int, str]:
    """Return how many images are taken, and why not all; an empty reason where all are."""
    most = min(MOST_COPIED, max(LEAST_COPIED, affordable))
    if data.images <= most:
        return data.images, ""
    if most == MOST_COPIED:
        return most, "no more are copied, however long the time"
    return most, f"reading all takes {minutes_text(data.images * data.read_seconds)}"


def _held_out(data: DataFacts, copied: int, affordable: int) -> int:
    """Images to hold out: of the data's own split, or else of the training split."""
    least, most = HELD_OUT_BOUNDS
    if data.held_out is not None:
        return min(data.held_out_images, MOST_HELD_OUT, max(least, affordable // 10))
    if copied < HELD_OUT_FROM:
        return 0
    return max(least, min(most, round(HELD_OUT_SHARE * copied)))


def _tokenizer_share(shape: Shape, speeds: Speeds, free: float) -> float:
    """Return the tokenizer's share of the `free` seconds of training."""
    tokenizer = shape.pictures * speeds.picture(shape)
    transformer = shape.rows * speeds.row(shape, USUAL_WIDTH)
    share = tokenizer / (tokenizer + transformer)
    least, most = SHARE_BOUNDS
    bounded = min(most, max(least, share))
    # where the time is enough for both, the bounds must not make it too short for one
    takes_enough = bounded * free >= tokenizer and (1 - bounded) * free >= transformer
    return bounded if takes_enough or tokenizer + transformer > free else share


def _width(shape: Shape, images: int, seconds: float, speeds: Speeds) -> tuple[int, str]:
    if shape.start_width is not None:
        return shape.start_width, "that model's images and words do for this data"
    rows = seconds / speeds.row(shape, USUAL_WIDTH)
    if rows < shape.rows / 2:
        return SMALL_WIDTH, (f"{USUAL_WIDTH} would see {rows:,.0f} rows in its time, of "
                             f"{shape.rows:,} that it takes")
    if images >= LARGE_DATA:
        wide_rows = seconds / speeds.row(shape, LARGE_WIDTH)
        if wide_rows >= max(shape.rows, 3 * images):
            return LARGE_WIDTH, f"time for {wide_rows:,.0f} rows of {images:,} images"
        return USUAL_WIDTH, f"{LARGE_WIDTH} would see {wide_rows:,.0f} rows in its time"
    return USUAL_WIDTH, f"a larger one learns {images:,} images by heart"


def _sampling(shape: Shape, images: int) -> dict[str, Any]:
    if shape.start_width is not None:
        return {"guidance": 2.0, "temperature": 0.5, "top_k": 128}
    if images < SMALL_DATA:
        return {"guidance": 2.0, "temperature": 1.0, "top_k": 64}
    return {"guidance": 4.0, "temperature": 1.0, "top_k": 256}


def _codebook_size(shape: Shape, images: int) -> int:
    if shape.codebook_size is not None:
        return shape.codebook_size
    if images >= LARGE_DATA and shape.tokens > 64:
        return 4096
    return 512 if images < SMALL_DATA or shape.size == 32 else 1024
