"""The config tree that the training scripts share: defaults < YAML recipe < command-line overrides.

An unknown key is an error that names the nearest valid one; the run folder keeps the merged config.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from tokenizer_image.images import MAX_IMAGE_PIXELS
from tokenloom_common.config import StrictConfig
from training.config.optim import OptimConfig


class PicturesConfig(StrictConfig):
    """Where captioned images are."""

    path: str = Field(description="image folder, parquet, webdataset tar shards, or a hub id")
    format: str | None = Field(
        None, description="metadata, sidecar, classes (folder names are the captions), parquet, "
                          "tar or saved; found by looking when not given")
    caption_column: str | None = Field(
        None, description="column with the caption; found by name when not given")
    image_column: str | None = Field(
        None, description="column with the picture; found by name when not given")
    caption_ending: str | None = Field(
        None, description="of the caption files beside pictures; none = .txt or .caption")
    encoding: str | None = Field(
        None, description="of captions without a byte order mark, such as cp1252; none = UTF-8")
    follow_links: bool = Field(
        False, description="follow links that lead out of the data's folder")
    max_pixels: int = Field(
        MAX_IMAGE_PIXELS, ge=1, le=1_000_000_000, description="of a picture; a larger JPEG is "
        "read at a half, a quarter or an eighth of its size, others are unusable")
    # ten bad ones are always tolerated: a share of few items says nothing (sources/drops.py)
    max_bad_fraction: float = Field(
        0.01, ge=0, le=1, description="share of unusable items above which the run stops")
    streaming: bool = Field(
        False, description="read parquet and tar shards where they lie, without a copy in the "
                           "cache of `datasets`: for data that is larger than the "
                           "disk has room for twice")

    def reading(self) -> dict[str, Any]:
        """Return the arguments of `open_dataset` that say how the data is read."""
        return {"format": self.format, "caption_column": self.caption_column,
                "image_column": self.image_column, "caption_ending": self.caption_ending,
                "encoding": self.encoding, "follow_links": self.follow_links,
                "max_pixels": self.max_pixels}


class DataConfig(PicturesConfig):
    """Captioned images to train on."""

    split: str | None = Field(
        None, description="which split of the data; none = train, or the only one")
    validation_split: str | None = Field(
        None, description="held-out split that is measured at the end, and every "
                          "train.validate_every steps")
    # no effect on augmentation, which is a function of (seed, epoch, sample index)
    workers: int = Field(
        0, ge=0, le=256, description="loader processes per rank; 0 = in the training process")
    # off by default: a caption that says left or right would be wrong half the time
    horizontal_flip: float = Field(0.0, ge=0, le=1, description="chance that a picture is mirrored")
    shuffle_rows: int | None = Field(
        None, ge=1, description="rows shuffled together, of shards that are read one after "
                                "another; each loader process keeps so many in memory (parquet); "
                                "none = 4096")

    @model_validator(mode="after")
    def _check_shuffle_rows(self) -> Self:
        if self.shuffle_rows is not None and not self.streaming:
            raise ValueError("data.shuffle_rows is for data.streaming true; without it all rows "
                             "are shuffled together")
        return self


class TrainConfig(StrictConfig):
    """Length, batch, precision and intervals of a run."""

    steps: int = Field(1000, ge=1, description="optimizer steps")
    batch_size: int = Field(
        32, ge=1, description="items per optimizer step over all processes")
    accumulation: int = Field(
        1, ge=1, description="micro-batches per optimizer step and process")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 on CUDA, float32 on CPU; float16 scales the loss, for "
                            "GPUs without bfloat16")
    gradient_checkpointing: bool = Field(
        False, description="keep fewer activations and compute them again: less memory, about a "
                           "third more time")
    compile: bool = Field(
        False, description="torch.compile the model: minutes at the start, a C++ compiler, "
                           "faster steps")
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    sample_every: int = Field(500, ge=0, description="steps between sample grids; 0 = none")
    validate_every: int = Field(
        0, ge=0, description="steps between measurements of data.validation_split; 0 = only when "
                             "the run is done")
    max_skipped_steps: int = Field(
        20, ge=0, description="steps skipped because a loss term or gradient was not finite, above "
                              "which the run saves a checkpoint and ends")
    stall_seconds: float = Field(
        600.0, ge=0, description="without a finished step for so long, every process writes its "
                                 "stacks and the run says where each one is; after twice as long "
                                 "it ends; 0 = wait for ever")
    weight_ema: float = Field(
        0.0, ge=0, lt=1, description="decay of a moving average of the weights, which is then what "
                                     "is sampled, measured and exported (in bfloat16: of the "
                                     "rounded weights); 0 = none")
    threads: int = Field(
        0, ge=0, description="CPU threads per process; 0 = cores / processes of this machine")


class CheckpointConfig(StrictConfig):
    """Checkpoints to resume from."""

    every_steps: int = Field(
        500, ge=0, description="steps between checkpoints; 0 = only at the end and on a signal")
    keep_last: int = Field(2, ge=1, description="older ones are deleted")
    keep_every_steps: int = Field(
        0, ge=0, description="those of a multiple of so many steps are never deleted; 0 = none")
    keep_best: bool = Field(
        False, description="the one that measured best on data.validation_split is not deleted "
                           "until another is better; RUN/best.json names it")
    resume: Literal["auto", "never", "required"] = Field(
        "auto", description="auto: continue the run folder's newest whole checkpoint, or start "
                            "fresh and say so")

    @model_validator(mode="after")
    def _check_kept_exist(self) -> Self:
        # with every_steps 0 only the last step has a checkpoint
        saved = self.every_steps and self.keep_every_steps % self.every_steps == 0
        if self.keep_every_steps and not saved:
            raise ValueError(f"keep_every_steps {self.keep_every_steps} must be a multiple of "
                             f"every_steps {self.every_steps}, or there is nothing to keep at most "
                             "of these steps")
        return self


OFFLOAD_LEAST_STAGE = {"none": 0, "optimizer": 1, "parameters": 3}
"""deepspeed.offload -> the lowest ZeRO stage that shards what it moves, and so can move it."""


class DeepSpeedConfig(StrictConfig):
    """DeepSpeed options; its JSON is derived from this tree."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="what is sharded over the processes: 0 nothing, 1 optimizer state, 2 and "
                       "gradients, 3 and parameters")
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none", description="what is kept in main memory instead of the GPU's: optimizer state "
                            "(zero_stage 1 to 3), and parameters (3)")
    config: str | None = Field(
        None, description="a DeepSpeed JSON of your own: what it sets beyond these keys is used, "
                          "\"auto\" is what they say, and another value than theirs is refused")

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        least = OFFLOAD_LEAST_STAGE[self.offload]
        if self.zero_stage < least:
            raise ValueError(f"offload '{self.offload}' needs zero_stage {least} or more, not "
                             f"{self.zero_stage}; raise it, or leave offload at none")
        return self


class LogConfig(StrictConfig):
    """Where numbers and sample grids go beside metrics.jsonl, which is always written."""

    tensorboard: bool = Field(False, description="TensorBoard's event files in RUN/tensorboard")
    wandb: bool = Field(
        False, description="Weights & Biases, its files in RUN/wandb; its own environment "
                           "variables hold too")
    wandb_project: str | None = Field(
        None, description="project there; none = WANDB_PROJECT, or tokenloom")
    wandb_mode: Literal["offline", "online"] | None = Field(
        None, description="offline writes files alone, for `wandb sync`; "
                          "none = WANDB_MODE, or offline")

    @model_validator(mode="after")
    def _check_read(self) -> Self:
        # an option that nothing reads is a mistake: it would be dropped in silence
        for name in ("wandb_project", "wandb_mode"):
            if getattr(self, name) is not None and not self.wandb:
                raise ValueError(f"log.{name} is for log.wandb, which is off; set log.wandb true, "
                                 "or leave it out")
        return self


class CardConfig(StrictConfig):
    """Lines of the export's model card that the run cannot know."""

    license: str | None = Field(
        None, pattern=r"^[a-z0-9][a-z0-9.+-]*$",
        description="of the exported weights, as the Hub names it: apache-2.0, cc-by-4.0, other; "
                    "none = the card says that nobody has chosen one")
    notes: str | None = Field(
        None, description="Markdown that the card carries: intended use, limits, whom to ask")


class RunConfig(StrictConfig):
    """The sections that every training script has."""

    run_dir: str = Field(
        description="folder of this run: config, metrics, samples, checkpoints, model")
    seed: int = Field(  # rank r takes seed + r, which stays below NumPy's limit of 1 << 32
        0, ge=0, lt=1 << 31, description="of weights, data order, augmentation and dropout")
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    card: CardConfig = CardConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @model_validator(mode="after")
    def _check_optimizers(self) -> Self:
        for section, optim in self:  # also the discriminator_optim of a subclass
            if isinstance(optim, OptimConfig):
                optim.check_in_run(section, self.train.steps, self.deepspeed.zero_stage)

        # at stage 0 the norm is our own sum over gradients (engine/), which knows no loss scale
        if self.train.precision == "float16" and self.deepspeed.zero_stage == 0:
            raise ValueError("train.precision float16 with deepspeed.zero_stage 0: gradients carry "
                             "a scale there that nothing tells about; "
                             "use zero_stage 1, 2 or 3, or bfloat16")
        if self.train.compile and self.deepspeed.zero_stage == 3:
            raise ValueError("train.compile with deepspeed.zero_stage 3: weights are fetched "
                             "between the compiled parts, which breaks them up; use zero_stage 0, "
                             "1 or 2, or leave train.compile out")
        return self

    @model_validator(mode="after")
    def _check_validation(self) -> Self:
        measured_every, saved_every = self.train.validate_every, self.checkpoint.every_steps
        data: DataConfig | None = getattr(self, "data", None)  # a section of every subclass
        if measured_every and (data is None or data.validation_split is None):
            raise ValueError(f"train.validate_every {measured_every} measures "
                             "data.validation_split, and none is named; name one, or leave "
                             "validate_every at 0")

        best_is_saved = measured_every and saved_every and measured_every % saved_every == 0
        if self.checkpoint.keep_best and not best_is_saved:
            raise ValueError("checkpoint.keep_best needs train.validate_every, here "
                             f"{measured_every}, to be a multiple of checkpoint.every_steps, here "
                             f"{saved_every}, so that every measured step has a checkpoint")
        return self
