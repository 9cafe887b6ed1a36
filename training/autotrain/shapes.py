"""Shapes of image and tokens, and which one data, memory and time allow.

The numbers of images and rows that a shape needs are those of the recipes' measured runs
(training/recipes/emoji32_*.yaml, emoji64_*.yaml; docs/tokenizers.md, docs/generator.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from tokenloom_common.errors import UserError, nearest_name
from training.autotrain.facts import DataFacts, StartFacts

SMALL_DATA, MIDDLE_DATA, LARGE_DATA = 1000, 5000, 20_000  # images
USUAL_WIDTH = 320  # of the transformer
WARM_START_SAVES = 3  # times fewer images or rows than from scratch
DECODER_SAVES = 12  # times fewer images where the decoder alone is trained


@dataclass(frozen=True)
class Shape:
    """Size of the images in pixels, pixels per token, and what decent results take.

    pictures: visits of images to train the tokenizer; rows: visits of rows for the transformer.
    codebook_size: None follows from the data. start: folder of the model that it begins from.
    start_width: of that model's transformer, where it begins from that too and keeps the codes.
    """

    size: int
    patch: int
    pictures: int
    rows: int
    codebook_size: int | None = None
    start: str | None = None
    start_width: int | None = None

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


def check_size(size: int | None) -> None:
    """UserError for a size that no shape has."""
    if size is not None and size not in SIZES:
        sizes = [str(known) for known in SIZES]
        raise UserError(f"--size {size}{nearest_name('', sizes)}")


def minutes_text(seconds: float) -> str:
    """Format a time: '40 seconds', '12 minutes', '3.5 hours'."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def choose_shape(data: DataFacts, images: int, free: float, speeds: Speeds,
                 start: StartFacts | None, size: int | None) -> tuple[Shape, str]:
    """Return the largest shape that data and time allow, and why it is no larger."""
    if size is not None:
        same_size = [shape for shape in _with_start(start, images) if shape.size == size]
        started = [shape for shape in same_size if shape.start is not None]
        if started and images < SMALL_DATA:
            return started[0], "--size"
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
    """The shapes; the one of a trained model begins from it."""
    shapes = []
    for shape in SHAPES:
        fits = (start is not None and start.size == shape.size
                and start.grid == (shape.size // shape.patch,) * 2)
        if start is not None and fits and images < LARGE_DATA:
            saves = DECODER_SAVES if start.knows_data else WARM_START_SAVES
            shape = replace(shape, start=start.folder, codebook_size=start.codebook_size,
                            pictures=shape.pictures // saves)
            if start.knows_data:
                shape = replace(shape, start_width=start.width,
                                rows=shape.rows // WARM_START_SAVES)
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
    return shape.pictures * speeds.picture(shape) + shape.rows * speeds.row(shape, USUAL_WIDTH)


def _affordable(shape: Shape, free: float, speeds: Speeds) -> bool:
    return _needed(shape, speeds) <= free
