"""Choose sizes, models and the split of the time: a function of data, machine, speed and minutes.

The numbers of images and rows that a shape needs are those of the recipes' measured runs
(training/recipes/demo_*.yaml, emoji64_*.yaml; docs/tokenizers.md, docs/generator.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from tokenloom_common.errors import UserError, nearest_name
from training.autotrain.facts import LONGEST_TEXT, DataFacts, MachineFacts, StartFacts

FLOOR_MINUTES = 1.0
SCRIPTS = 3  # starts of the launcher: image tokenizer, tokens, transformer
REPORT_SHARE = 0.05  # of the minutes, for samples and measurements
LEAST_REPORT_SECONDS = 15.0
SAMPLED, SAMPLING = 30, 4.0  # pictures sampled at least; seconds of one / seconds of a row
COPY_SHARE = 0.15  # of the minutes, at most, for reading the images once
LEAST_TRAINING_SECONDS = 20.0
LEAST_STEPS = 20
SHARE_BOUNDS = (0.25, 0.6)  # of the training time, for the image tokenizer
ENCODING = 0.3  # seconds to encode an image / seconds to learn from it

MOST_COPIED = 200_000  # images
HELD_OUT_SHARE = 0.05
HELD_OUT_BOUNDS = (10, 500)
MOST_HELD_OUT = 2000  # of the data's own
HELD_OUT_FROM = 100  # images; of fewer none is spared

SMALL_DATA, MIDDLE_DATA, LARGE_DATA = 1000, 5000, 20_000  # images
WARM_START_SAVES = 3  # times fewer images than from scratch


@dataclass(frozen=True)
class Shape:
    """Size of the images in pixels, pixels per token, and what decent results take.

    pictures: visits of images to train the tokenizer; rows: visits of rows for the transformer.
    codebook_size: None follows from the data. start: folder of the model that it begins from.
    """

    size: int
    patch: int
    pictures: int
    rows: int
    codebook_size: int | None = None
    start: str | None = None

    @property
    def tokens(self) -> int:
        """Image tokens of a picture."""
        return (self.size // self.patch) ** 2

    @property
    def grid(self) -> str:
        """The grid of tokens in words."""
        side = self.size // self.patch
        return f"{side} x {side}"


SHAPES = (  # each one takes more time than those before it
    Shape(32, 4, 24_000, 25_000),
    Shape(64, 8, 36_000, 25_000),
    Shape(64, 4, 40_000, 60_000),
    Shape(128, 8, 80_000, 60_000),
    Shape(256, 16, 160_000, 80_000),
)
SIZES = tuple(sorted({shape.size for shape in SHAPES}))
WIDTHS = {128: (2, 4), 256: (2, 4), 512: (6, 12)}
"""Width of the transformer -> layers of its encoder and decoder."""


class Speeds(Protocol):
    """Measured speed of this machine, all of its processes together."""

    start_seconds: float
    """To start a script through the launcher."""

    def picture(self, shape: Shape) -> float:
        """Seconds in which an image tokenizer of this shape learns from one image."""

    def row(self, shape: Shape, width: int) -> float:
        """Seconds in which a transformer learns from one row."""

    def fits(self, shape: Shape) -> bool:
        """Whether the memory of a device holds the training of this shape's tokenizer."""


class Line(NamedTuple):
    """One choice as it is said."""

    name: str
    value: str
    why: str


@dataclass(frozen=True)
class Times:
    """Seconds that the stages may take; speeds: seconds an image and a row."""

    copy: float
    tokenizer: float
    encode: float
    transformer: float
    report: float
    picture_seconds: float
    row_seconds: float


@dataclass(frozen=True)
class Choices:
    """Everything that the scripts' configs follow from."""

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
    top_k: int
    copied: int
    held_out: int
    times: Times
    lines: tuple[Line, ...] = field(default=(), compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

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
    if not FLOOR_MINUTES <= minutes <= 60 * 24 * 60:  # NaN too
        raise UserError(f"--minutes {minutes:g}: give {FLOOR_MINUTES:g} to 86400; starting the "
                        "three programs alone takes most of a minute")


def check_size(size: int | None) -> None:
    """UserError for a size that no shape has."""
    if size is not None and size not in SIZES:
        sizes = [str(known) for known in SIZES]
        raise UserError(f"--size {size}{nearest_name('', sizes)}")


def choose(data: DataFacts, machine: MachineFacts, seconds: float, speeds: Speeds,
           start: StartFacts | None = None, size: int | None = None) -> Choices:
    """Choose for `seconds` that are left. size: asked for by the user."""
    copied, copy_why = _copied(data, seconds)
    held_out = _held_out(data, copied)
    images = copied - (held_out if data.held_out is None else 0)
    own_held_out = held_out if data.held_out is not None else 0
    copy_seconds = (copied + own_held_out) * data.read_seconds
    report = max(LEAST_REPORT_SECONDS, REPORT_SHARE * seconds)
    fixed = copy_seconds + SCRIPTS * speeds.start_seconds

    shape, shape_why = _shape(data, images, seconds - fixed - report, speeds, start, size)
    picture_seconds = speeds.picture(shape)
    encode = copied * picture_seconds * ENCODING
    sampling = SAMPLED * SAMPLING * speeds.row(shape, 256)
    report = max(report, speeds.start_seconds / 2 + sampling)
    free = max(LEAST_TRAINING_SECONDS, seconds - fixed - encode - report)
    share = _tokenizer_share(shape, speeds)
    width, width_why = _width(shape, images, free * (1 - share), speeds)
    times = Times(copy_seconds, free * share, encode, free * (1 - share), report, picture_seconds,
                  speeds.row(shape, width))
    choices = Choices(
        shape=shape, codebook_size=_codebook_size(shape, images), channels=channels_of(machine),
        tokenizer_batch=tokenizer_batch(machine), flip=0.5 if images < MIDDLE_DATA else 0.0,
        width=width, dropout=0.0, batch=row_batch(machine), vocabulary=data.vocabulary,
        text_length=min(LONGEST_TEXT, max(8, data.text_ids)),
        guidance=2.0 if images < SMALL_DATA else 3.0, top_k=64 if images < SMALL_DATA else 128,
        copied=copied, held_out=held_out, times=times)
    epochs = choices.steps * choices.batch / images
    if width == max(WIDTHS) or (images >= SMALL_DATA and epochs >= 15):
        choices = replace(choices, dropout=0.1)
    whys = {"size": shape_why, "width": width_why, "copy": copy_why}
    return replace(choices, lines=tuple(_lines(choices, data, machine, images, whys)),
                   notes=tuple(_notes(choices, data, seconds)))


def channels_of(machine: MachineFacts) -> int:
    """First channels of the image tokenizer."""
    return 64 if machine.gpus else 16


def tokenizer_batch(machine: MachineFacts) -> int:
    """Images in a step of the image tokenizer."""
    # on CPUs 8 learned more than 16 at equal images (docs/tokenizers.md)
    return 32 * machine.processes if machine.gpus else 8


def row_batch(machine: MachineFacts) -> int:
    """Rows in a step of the transformer."""
    return 64 * machine.processes if machine.gpus else 32


# ---- one choice each

def _copied(data: DataFacts, seconds: float) -> tuple[int, str | None]:
    affordable = int(COPY_SHARE * seconds / max(1e-9, data.read_seconds))
    most = min(MOST_COPIED, max(MIDDLE_DATA, affordable))
    if data.images <= most:
        return data.images, None
    why = (f"reading all takes {minutes_text(data.images * data.read_seconds)}"
           if most < MOST_COPIED else "more are not seen often enough in the time")
    return most, why


def _held_out(data: DataFacts, copied: int) -> int:
    """Images to hold out of the training split, where the data has no split of its own."""
    if data.held_out is not None:
        return min(data.held_out_images, MOST_HELD_OUT)
    if copied < HELD_OUT_FROM:
        return 0
    least, most = HELD_OUT_BOUNDS
    return max(least, min(most, round(HELD_OUT_SHARE * copied)))


def _shape(data: DataFacts, images: int, free: float, speeds: Speeds, start: StartFacts | None,
           size: int | None) -> tuple[Shape, str]:
    """Return the largest shape that data and time allow, and why it is no larger."""
    if size is not None:
        same_size = [shape for shape in _with_start(start, images) if shape.size == size]
        affordable = [shape for shape in same_size if _affordable(shape, free, speeds)]
        return (affordable or same_size[:1])[-1], "--size"

    shapes = _with_start(start, images)
    best = shapes[0]
    for shape in shapes[1:]:
        if best.start is not None and images < SMALL_DATA:
            return best, "the size of the model that it starts from"
        reason = _too_large(shape, data, images)
        # a larger one from scratch takes longer still, and each measurement takes seconds
        from_scratch = shape.start is None
        if reason is None and from_scratch and not _affordable(best, free, speeds):
            needed = minutes_text(_needed(best, speeds))
            return best, f"takes {needed} of training itself, and a larger one more"
        if reason is None and not speeds.fits(shape):
            reason = "does not fit into memory"
        if reason is None and not _affordable(shape, free, speeds):
            reason = f"takes {minutes_text(_needed(shape, speeds))} of training on this machine"
        if reason is not None:
            return best, f"{shape.size} px with {shape.tokens} tokens {reason}"
        best = shape
    return best, "the largest there is"


def _with_start(start: StartFacts | None, images: int) -> list[Shape]:
    """The shapes; the one that a trained tokenizer has begins from it."""
    shapes = []
    for shape in SHAPES:
        fits = (start is not None and start.size == shape.size
                and start.grid == (shape.size // shape.patch,) * 2)
        if start is not None and fits and images < LARGE_DATA:
            shape = replace(shape, start=start.folder, codebook_size=start.codebook_size,
                            pictures=shape.pictures // WARM_START_SAVES)
        shapes.append(shape)
    return shapes


def _too_large(shape: Shape, data: DataFacts, images: int) -> str | None:
    if shape.size == SHAPES[0].size:
        return None
    # an eighth: 56 pixels enlarged to 64 are no worse than 64 that were 72
    if shape.size * 7 / 8 > data.shorter_side:
        return f"is more than the images have (shorter side {data.shorter_side})"
    if shape.size > 64 and images < SMALL_DATA:
        return f"is too much to learn from {images:,} images"
    if shape.size > 128 and images < MIDDLE_DATA:
        return f"is too much to learn from {images:,} images"
    return None


def _needed(shape: Shape, speeds: Speeds) -> float:
    """Seconds of training until decent results."""
    return shape.pictures * speeds.picture(shape) + shape.rows * speeds.row(shape, 256)


def _affordable(shape: Shape, free: float, speeds: Speeds) -> bool:
    return _needed(shape, speeds) <= free


def _tokenizer_share(shape: Shape, speeds: Speeds) -> float:
    tokenizer = shape.pictures * speeds.picture(shape)
    share = tokenizer / (tokenizer + shape.rows * speeds.row(shape, 256))
    least, most = SHARE_BOUNDS
    return min(most, max(least, share))


def _width(shape: Shape, images: int, seconds: float, speeds: Speeds) -> tuple[int, str]:
    rows = seconds / speeds.row(shape, 256)
    if rows < shape.rows / 2:
        return 128, f"256 would see {rows:,.0f} rows in its time, of {shape.rows:,} that it takes"
    if images >= LARGE_DATA:
        wide_rows = seconds / speeds.row(shape, 512)
        if wide_rows >= max(shape.rows, 3 * images):
            return 512, f"time for {wide_rows:,.0f} rows of {images:,} images"
        return 256, f"512 would see {wide_rows:,.0f} rows in its time"
    return 256, f"a larger one learns {images:,} images by heart"


def _codebook_size(shape: Shape, images: int) -> int:
    if shape.codebook_size is not None:
        return shape.codebook_size
    if images >= LARGE_DATA and shape.tokens > 64:
        return 4096
    return 512 if images < SMALL_DATA or shape.size == 32 else 1024


# ---- in words

def minutes_text(seconds: float) -> str:
    """Format a time: '40 seconds', '12 minutes', '3.5 hours'."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def _lines(choices: Choices, data: DataFacts, machine: MachineFacts, images: int,
           whys: dict[str, str | None]) -> list[Line]:
    shape, times = choices.shape, choices.times
    lines = [Line("data", f"{choices.copied:,} images of {data.images:,}",
                  whys["copy"] or f"{data.distinct:,} different captions, {data.words:,} words, "
                                  f"median shorter side {data.shorter_side} px")]
    if data.held_out is not None:
        held_out, why = f"{choices.held_out:,} images of split {data.held_out}", "the data's own"
    elif choices.held_out:
        held_out, why = f"{choices.held_out:,} images", "the data has no split for it"
    else:
        held_out, why = "none", f"{data.images:,} images are too few to spare some"
    lines.append(Line("held out", held_out, why))
    lines.append(Line("devices", machine.devices, "all that there are"))
    lines.append(Line("image size", f"{shape.size} px", whys["size"] or ""))
    origin = f"starts from {shape.start}" if shape.start else "from scratch"
    lines.append(Line("image tokenizer",
                      f"{shape.grid} tokens of {choices.codebook_size:,} codes, {origin}",
                      _tokenizer_why(choices, machine)))
    encoder, decoder = WIDTHS[choices.width]
    lines.append(Line("transformer", f"width {choices.width}, {encoder} + {decoder} layers",
                      whys["width"] or ""))
    lines.append(Line("captions", f"{choices.text_length} ids of {choices.vocabulary:,}",
                      f"99 % of them fit into {data.text_ids}, "
                      f"{data.mean_words:.1f} words on average"))
    lines.append(Line("guidance", f"{choices.guidance:g}, top-k {choices.top_k}, "
                                  "caption dropout 0.1",
                      "few images: stronger guidance makes them all alike"
                      if choices.guidance == 2 else "what docs/generator.md found best"))
    pictures = choices.tokenizer_steps * choices.tokenizer_batch
    lines.append(Line("tokenizer's time", f"{minutes_text(times.tokenizer)}: "
                      f"{choices.tokenizer_steps:,} steps of {choices.tokenizer_batch}",
                      f"{pictures / images:,.0f} epochs at {1 / times.picture_seconds:,.0f} "
                      "images a second, measured"))
    rows = choices.steps * choices.batch
    lines.append(Line("transformer's time", f"{minutes_text(times.transformer)}: "
                      f"{choices.steps:,} steps of {choices.batch}",
                      f"{rows / images:,.0f} epochs at {1 / times.row_seconds:,.0f} rows a second, "
                      "measured"))
    rest = times.copy + times.encode + times.report
    lines.append(Line("other time", minutes_text(rest), "reading, encoding, samples and report"))
    return lines


def _tokenizer_why(choices: Choices, machine: MachineFacts) -> str:
    if choices.shape.start:
        return "its codes are those of that model; fewer images teach it the rest"
    return f"{choices.channels} channels on a {'GPU' if machine.gpus else 'CPU'}"


def _notes(choices: Choices, data: DataFacts, seconds: float) -> list[str]:
    """Things to expect, said before anything is trained."""
    shape, times = choices.shape, choices.times
    notes = []
    picture_share = times.tokenizer / (shape.pictures * times.picture_seconds)
    row_share = times.transformer / (shape.rows * times.row_seconds)
    if min(picture_share, row_share) < 1:
        good = (shape.pictures * times.picture_seconds + shape.rows * times.row_seconds
                + seconds - times.tokenizer - times.transformer)
        notes.append(
            f"the time is short: it is {100 * min(picture_share, row_share):.0f} % of what decent "
            f"results take here ({minutes_text(good)} in all); expect "
            + _short_of(picture_share, row_share))
    if data.distinct == 1:
        notes.append("all captions are the same: the model will not tell captions apart")
    if data.images < HELD_OUT_FROM:
        notes.append(f"{data.images:,} images are few: the model will know these pictures and "
                     "little else")
    return notes


def _short_of(picture_share: float, row_share: float) -> str:
    expected: Sequence[str] = [
        *(["blurry pictures"] if picture_share < 1 else []),
        *(["pictures that follow their captions badly"] if row_share < 1 else [])]
    return " and ".join(expected)
