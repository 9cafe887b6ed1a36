"""The config tree of the training scripts: defaults < YAML recipe < dotted command-line overrides.

An unknown key is an error that names the nearest valid one; the merged config is written beside the run.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

from tokenizer_image import KINDS, ImageTokenizerConfig, TokenizerLossConfig, VQGANConfig, preset
from tokenizer_image.adversarial import AdversarialConfig
from tokenloom_common.config import StrictConfig, explain, merge
from tokenloom_common.errors import choose
from training.optim_config import DiscriminatorOptimConfig, OptimConfig
from training.start_folders import tokenizer_of_start

VQGAN_KIND = VQGANConfig().kind


class PicturesConfig(StrictConfig):
    """Where captioned images are."""

    path: str = Field(description="image folder, parquet, webdataset tar shards, or a hub id")
    caption_column: str | None = Field(None, description="column with the caption; found by name when not given")
    image_column: str | None = Field(None, description="column with the picture; found by name when not given")
    max_bad_fraction: float = Field(0.01, ge=0, le=1, description="share of unusable items above which the run stops")
    streaming: bool = Field(False, description="read parquet and tar shards where they lie, without a copy in the cache of "
                            "`datasets`: for data that is larger than the disk has room for twice")


class DataConfig(PicturesConfig):
    """Captioned images to train on."""

    split: str | None = Field(None, description="which split of the data; none = train, or the only one")
    validation_split: str | None = Field(None, description="held-out split that is measured at the end, and every "
                                         "train.validate_every steps")
    workers: int = Field(0, ge=0, le=256, description="loader processes per rank; 0 = in the training process")
    horizontal_flip: float = Field(0.0, ge=0, le=1, description="chance that a picture is mirrored")
    shuffle_rows: int | None = Field(None, ge=1, description="rows shuffled together, of shards that are read one after "
                                     "another; each loader process keeps so many in memory (parquet); none = 4096")

    @model_validator(mode="after")
    def _shuffled_streams(self) -> Self:
        if self.shuffle_rows is not None and not self.streaming:
            raise ValueError("data.shuffle_rows is for data.streaming true; without it all rows are shuffled together")
        return self


class TrainConfig(StrictConfig):
    """How long, how much at a time, how often to look."""

    steps: int = Field(1000, ge=1, description="optimizer steps")
    batch_size: int = Field(32, ge=1, description="items per optimizer step over all processes")
    accumulation: int = Field(1, ge=1, description="micro-batches per optimizer step and process")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 on CUDA, float32 on CPU; float16 scales the loss, for GPUs without bfloat16")
    gradient_checkpointing: bool = Field(False, description="keep fewer activations and compute them again: less memory, "
                                         "about a third more time")
    compile: bool = Field(False, description="torch.compile the model: minutes at the start, a C++ compiler, faster steps")
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    sample_every: int = Field(500, ge=0, description="steps between sample grids; 0 = none")
    validate_every: int = Field(0, ge=0, description="steps between measurements of data.validation_split; 0 = only when the "
                                "run is done")
    max_skipped_steps: int = Field(20, ge=0, description="steps skipped because a loss term or gradient was not finite, above "
                                   "which the run saves a checkpoint and ends")
    stall_seconds: float = Field(600.0, ge=0, description="without a finished step for so long, every process writes its "
                                 "stacks and the run says where each one is; after twice as long it ends; 0 = wait for ever")
    weight_ema: float = Field(0.0, ge=0, lt=1, description="decay of a moving average of the weights, which is then what is "
                              "sampled, measured and exported (in bfloat16: of the rounded weights); 0 = none")
    threads: int = Field(0, ge=0, description="CPU threads per process; 0 = cores / processes of this machine")


class CheckpointConfig(StrictConfig):
    """Checkpoints to resume from."""

    every_steps: int = Field(500, ge=0, description="steps between checkpoints; 0 = only at the end and on a signal")
    keep_last: int = Field(2, ge=1, description="older ones are deleted")
    keep_every_steps: int = Field(0, ge=0, description="those of a multiple of so many steps are never deleted; 0 = none")
    keep_best: bool = Field(False, description="the one that measured best on data.validation_split is not deleted until "
                            "another is better; RUN/best.json names it")
    resume: Literal["auto", "never", "required"] = Field(
        "auto", description="auto: continue the run folder's newest whole checkpoint, or start fresh and say so")

    @model_validator(mode="after")
    def _kept_ones_exist(self) -> Self:
        if self.keep_every_steps and (not self.every_steps or self.keep_every_steps % self.every_steps):
            raise ValueError(f"keep_every_steps {self.keep_every_steps} must be a multiple of every_steps {self.every_steps}, "
                             "or there is nothing to keep at most of these steps")
        return self


class DeepSpeedConfig(StrictConfig):
    """What DeepSpeed is asked to do; its JSON is derived from this tree."""

    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="what is sharded over the processes: 0 nothing, 1 optimizer "
                                            "state, 2 and gradients, 3 and parameters")
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none", description="what is kept in main memory instead of the GPU's: optimizer state (zero_stage 1 to 3), and "
        "parameters (3)")
    config: str | None = Field(None, description="a DeepSpeed JSON of your own: what it sets beyond these keys is used, "
                               "\"auto\" is what they say, and another value than theirs is refused")

    @model_validator(mode="after")
    def _offload_possible(self) -> Self:
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(f"offload '{self.offload}' needs zero_stage {least} or more, not {self.zero_stage}; raise it, or "
                             "leave offload at none")
        return self


class LogConfig(StrictConfig):
    """Where numbers and sample grids go beside metrics.jsonl, which is always written."""

    tensorboard: bool = Field(False, description="TensorBoard's event files in RUN/tensorboard")
    wandb: bool = Field(False, description="Weights & Biases, its files in RUN/wandb; its own environment variables hold too")
    wandb_project: str | None = Field(None, description="project there; none = WANDB_PROJECT, or tokenloom")
    wandb_mode: Literal["offline", "online"] | None = Field(
        None, description="offline writes files alone, for `wandb sync`; none = WANDB_MODE, or offline")

    @model_validator(mode="after")
    def _only_what_is_read(self) -> Self:
        unread = [name for name in ("wandb_project", "wandb_mode") if getattr(self, name) is not None]
        if unread and not self.wandb:
            raise ValueError(f"log.{unread[0]} is for log.wandb, which is off; set log.wandb true, or leave it out")
        return self


class CardConfig(StrictConfig):
    """What the model card of the export says beside what the run knows."""

    license: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9.+-]*$", description="of the exported weights, as the Hub "
                                "names it: apache-2.0, cc-by-4.0, other; none = the card says that nobody has chosen one")
    notes: str | None = Field(None, description="Markdown that the card carries: intended use, limits, whom to ask")


class RunConfig(StrictConfig):
    """What every training script shares."""

    run_dir: str = Field(description="folder of this run: config, metrics, samples, checkpoints, model")
    seed: int = Field(0, ge=0, lt=1 << 31, description="of weights, data order, augmentation and dropout")
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    card: CardConfig = CardConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @model_validator(mode="after")
    def _optimizers_possible(self) -> Self:
        for section, optim in self:
            if isinstance(optim, OptimConfig):
                optim.check_in_run(section, self.train.steps, self.deepspeed.zero_stage)
        if self.train.precision == "float16" and self.deepspeed.zero_stage == 0:
            raise ValueError("train.precision float16 with deepspeed.zero_stage 0: gradients carry a scale there that nothing "
                             "tells about; use zero_stage 1, 2 or 3, or bfloat16")
        if self.train.compile and self.deepspeed.zero_stage == 3:
            raise ValueError("train.compile with deepspeed.zero_stage 3: weights are fetched between the compiled parts, which "
                             "breaks them up; use zero_stage 0, 1 or 2, or leave train.compile out")
        return self


    @model_validator(mode="after")
    def _measured_on_something(self) -> Self:
        every, saved = self.train.validate_every, self.checkpoint.every_steps
        if every and getattr(getattr(self, "data", None), "validation_split", None) is None:
            raise ValueError(f"train.validate_every {every} measures data.validation_split, and none is named; name one, or "
                             "leave validate_every at 0")
        if self.checkpoint.keep_best and (not every or not saved or every % saved):
            raise ValueError(f"checkpoint.keep_best needs train.validate_every, here {every}, to be a multiple of "
                             f"checkpoint.every_steps, here {saved}, so that every measured step has a checkpoint")
        return self


class TokenizerTrainConfig(TrainConfig):
    """What only the training of an image tokenizer has."""

    trained_part: Literal["all", "decoder"] = Field("all", description="decoder: codes stay as init_from has them, only the "
                                                    "way from codes to pixels learns")

    @model_validator(mode="before")
    @classmethod
    def _of_before(cls, values: Any) -> Any:
        """`start_from: null` of a config.yaml from before init_from meant nothing."""
        unset = isinstance(values, dict) and "start_from" in values and values["start_from"] is None
        return {name: value for name, value in values.items() if name != "start_from"} if unset else values


class CodebookHealthConfig(StrictConfig):
    """How the codebook is watched."""

    window: int = Field(0, ge=0, description="pictures over which usage and perplexity are counted; 0 = an epoch")
    warn_below: float = Field(0.5, ge=0, le=1, description="share of codes in use below which a warning says what to try")


class TokenizerRunConfig(RunConfig):
    """training/train_tokenizer.py: images -> an image tokenizer."""

    renamed: ClassVar[dict[str, str]] = {"train.start_from": "init_from"}

    data: DataConfig
    init_from: str | None = Field(None, description="folder or hub id of a trained image tokenizer, or of a model folder that "
                                  "has one: its weights are where this one starts, and model.* is taken from there")
    model: SerializeAsAny[ImageTokenizerConfig] = VQGANConfig()
    loss: TokenizerLossConfig = TokenizerLossConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    train: TokenizerTrainConfig = TokenizerTrainConfig()
    discriminator_optim: DiscriminatorOptimConfig = DiscriminatorOptimConfig()
    codebook: CodebookHealthConfig = CodebookHealthConfig()

    @model_validator(mode="before")
    @classmethod
    def _model_of_the_start(cls, values: Any) -> Any:
        """A model that is not described is the one of init_from."""
        if not isinstance(values, dict) or values.get("init_from") is None:
            return values
        model = values.get("model") or {}
        if not isinstance(model, dict) or {"kind", "preset"} & set(model):
            return values
        return {**values, "model": merge(tokenizer_of_start(values), model)}

    @field_validator("model", mode="before")
    @classmethod
    def _family(cls, values: Any) -> Any:
        """Build the config of the family that `kind` or `preset` names."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        name = values.pop("preset", None)
        if name is not None:
            values = merge(preset(str(name)).plain(), values)
        kind = choose(KINDS, str(values.get("kind", VQGAN_KIND)), "model.kind")
        try:
            return kind.config_class.model_validate(values)
        except ValidationError as error:
            raise ValueError(explain(kind.config_class, error)) from None

    @model_validator(mode="after")
    def _possible(self) -> TokenizerRunConfig:
        if self.deepspeed.zero_stage == 3:
            raise ValueError("deepspeed.zero_stage 3 shards parameters, and an image tokenizer is too small for that; "
                             "use 0, 1 or 2")
        if self.train.precision == "float16":
            raise ValueError("train.precision float16 is too narrow for distances to codes; use bfloat16 or float32")
        if self.train.compile:
            raise ValueError("train.compile: the codebook of an image tokenizer changes itself inside a step, which breaks "
                             "compiled code up; leave it out")
        self.model.check_encodes(self.init_from or "model")
        if self.train.trained_part == "decoder" and self.init_from is None:
            raise ValueError("train.trained_part 'decoder' needs init_from, the tokenizer whose codes are kept")
        own = getattr(self.model, "output", None) == "logit_laplace" and self.train.trained_part != "decoder"
        if not (own or self.loss.l1_weight or self.loss.l2_weight or self.loss.perceptual_weight):
            raise ValueError("loss: no term of the picture has a weight, so there is nothing to learn; set l1_weight, "
                             "l2_weight or perceptual_weight")
        first = self.adversarial.start_step + self.adversarial.head_start_steps
        if self.adversarial.weight and first >= self.train.steps:
            raise ValueError(f"adversarial.start_step + head_start_steps = {first} is not before the end of the run "
                             f"(train.steps {self.train.steps}); lower them, or set adversarial.weight to 0")
        return self
