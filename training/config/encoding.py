"""Config of training/encode_dataset.py."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tokenloom_common.config import StrictConfig
from training.config.run import PicturesConfig


class LayoutConfig(StrictConfig):
    """A coarse grid of classes that models may be given, or sample, before the image tokens."""

    kind: Literal["none", "classes", "colors"] = Field(
        "none", description="classes: from a column of the data; colors: the picture's own, in 27 "
                            "classes")  # 3 levels per channel, see inference/layouts.py
    grid: tuple[int, int] = Field((4, 4), description="rows and columns that are kept")
    column: str = Field(
        "layout", description="column with the classes, in raster order of a square grid; "
                              "for kind classes")
    classes: int | None = Field(  # at most 1 << 16: layouts are stored like tokens, in uint16
        None, ge=2, le=1 << 16, description="number of classes in the column; for kind classes")

    @model_validator(mode="after")
    def _check(self) -> LayoutConfig:
        if min(self.grid) < 1 or max(self.grid) > 64:
            raise ValueError(f"layout.grid {self.grid}: give 1 to 64 rows and columns")
        if (self.kind == "classes") != (self.classes is not None):
            raise ValueError("layout.classes, the number of classes, is for layout.kind classes, "
                             "which needs it")
        # the default is no mistake: every merged config holds all keys
        if self.kind != "classes" and self.column != "layout":
            raise ValueError(f"layout.column is for layout.kind classes, not {self.kind}; "
                             "leave it out")
        return self


class ViewsConfig(StrictConfig):
    """Further encodings of an image beside the plain one; each visit draws one of them."""

    flip: bool = Field(
        False, description="every view mirrored too; a caption that says left or right is then "
                           "wrong half the time")
    corners: bool = Field(
        False, description="the four corners of a slightly enlarged picture too (LlamaGen, with "
                           "flip: ten crops)")
    enlarged: float = Field(1.1, gt=1, le=2, description="by how much, for corners")

    @model_validator(mode="after")
    def _check_read(self) -> ViewsConfig:
        default = type(self).model_fields["enlarged"].default
        if not self.corners and self.enlarged != default:
            raise ValueError("views.enlarged is for views.corners true; leave it out")
        return self


class EncodeRunConfig(StrictConfig):
    """training/encode_dataset.py: captioned images + an image tokenizer -> token shards."""

    image_tokenizer: str = Field(description="folder of the image tokenizer")
    data: PicturesConfig
    out: str = Field(description="folder for the token shards")
    layout: LayoutConfig = LayoutConfig()
    views: ViewsConfig = ViewsConfig()
    splits: list[str] | None = Field(
        None, min_length=1, description="splits to encode; none = every split of the data")
    batch_size: int = Field(64, ge=1, description="pictures at a time and process")
    shard_rows: int = Field(
        50_000, ge=1, le=1_000_000, description="rows per shard; a run that is started again goes "
                                                "on after the last whole one")
    workers: int = Field(
        0, ge=0, le=256, description="processes that read pictures, per rank; 0 = the encoding one")
    threads: int = Field(
        0, ge=0, description="CPU threads per process; 0 = cores / processes of this machine")

    @model_validator(mode="after")
    def _check_layout_of_views(self) -> EncodeRunConfig:
        if self.views.corners and self.layout.kind == "classes":
            raise ValueError("views.corners shows other parts of a picture than the classes of "
                             "layout.kind classes describe; "
                             "use layout.kind colors, or views.flip alone")
        return self
