"""The config tree of the training scripts: defaults < YAML recipe < dotted command-line overrides.

An unknown key is an error that names the nearest valid one; the merged config is written beside the run.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

from seq2seq.losses import TokenLossConfig
from tokenizer_image import KINDS, ImageTokenizerConfig, TokenizerLossConfig, VQGANConfig, preset
from tokenizer_image.adversarial import AdversarialConfig
from tokenloom_common.config import StrictConfig, explain, merge, read_mapping
from tokenloom_common.errors import choose
from tokenloom_common.pretrained import resolve_folder
from training.model_settings import TransformerSettings, read_settings

VQGAN_KIND = VQGANConfig().kind


class PicturesConfig(StrictConfig):
    """Where captioned images are."""

    path: str = Field(description="image folder, parquet, webdataset tar shards, or a hub id")
    caption_column: str | None = Field(None, description="column with the caption; found by name when not given")
    image_column: str | None = Field(None, description="column with the picture; found by name when not given")
    max_bad_fraction: float = Field(0.01, ge=0, le=1, description="share of unusable items above which the run stops")


class DataConfig(PicturesConfig):
    """Captioned images to train on."""

    split: str | None = Field(None, description="which split of the data; none = train, or the only one")
    validation_split: str | None = Field(None, description="held-out split that is measured at the end")
    workers: int = Field(0, ge=0, le=256, description="loader processes per rank; 0 = in the training process")
    horizontal_flip: float = Field(0.0, ge=0, le=1, description="chance that a picture is mirrored")


class TokenDataConfig(StrictConfig):
    """Token shards made by encode_dataset."""

    path: str = Field(description="folder that encode_dataset wrote")
    split: str = Field("train", description="which split of the token shards")
    validation_split: str | None = Field(None, description="held-out split that is measured at the end")
    workers: int = Field(0, ge=0, le=256, description="loader processes per rank; 0 = in the training process")


class TrainConfig(StrictConfig):
    """How long, how much at a time, how often to look."""

    steps: int = Field(1000, ge=1, description="optimizer steps")
    batch_size: int = Field(32, ge=1, description="items per optimizer step over all processes")
    accumulation: int = Field(1, ge=1, description="micro-batches per optimizer step and process")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on CUDA, float32 on CPU")
    log_every: int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    sample_every: int = Field(500, ge=0, description="steps between sample grids; 0 = none")
    max_skipped_steps: int = Field(20, ge=0, description="steps skipped because a loss term or gradient was not finite, above "
                                   "which the run saves a checkpoint and ends")
    weight_ema: float = Field(0.0, ge=0, lt=1, description="decay of a moving average of the weights, which is then what is "
                              "sampled, measured and exported (in bfloat16: of the rounded weights); 0 = none")
    threads: int = Field(0, ge=0, description="CPU threads per process; 0 = cores / processes of this machine")


Beta = Annotated[float, Field(ge=0, lt=1)]
Schedule = Literal["cosine", "constant", "exponential", "halving", "inverse_sqrt", "linear"]


class OptimConfig(StrictConfig):
    """The optimizer, and its learning rate after a linear warm-up."""

    READ_BY: ClassVar[dict[str, tuple[str, tuple[str, ...]]]] = {
        "final_lr_ratio": ("schedule", ("cosine", "exponential", "linear")),
        "decay_start_step": ("schedule", ("exponential",)),
        "halve_at_steps": ("schedule", ("halving",)),
        "update_clipping": ("name", ("adafactor",)),
        "parameter_scaling": ("name", ("adafactor",)),
    }
    """Options that are not always read -> the choice that decides, and the names of it with which they are read."""

    name: Literal["adamw", "adafactor"] = Field("adamw", description="adafactor: Parti's; needs deepspeed.zero_stage 0")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="decay of the first and of the second moment; Parti and DALL-E: "
                                     "0.9, 0.96; adafactor keeps no first moment with 0")
    weight_decay: float = Field(0.05, ge=0, description="on matrices; never on gains, biases and embeddings")
    update_clipping: float = Field(1.0, gt=0, description="adafactor: largest root mean square of a weight's update / lr")
    parameter_scaling: bool = Field(False, description="adafactor: steps in proportion to the size of the weights")
    warmup_steps: int = Field(50, ge=0)
    schedule: Schedule = Field("cosine", description="after the warm-up; exponential: Parti's, halving: DALL-E's")
    final_lr_ratio: float = Field(0.05, ge=0, le=1, description="lr at the end / peak lr, for cosine, exponential and linear")
    decay_start_step: int | None = Field(None, ge=0, description="exponential: constant up to this step; none = no longer than "
                                         "the warm-up")
    halve_at_steps: tuple[int, ...] = Field((), description="halving: the steps from which lr is half of what it was")
    gradient_clipping: float = Field(1.0, ge=0, description="largest global gradient norm; 0 = no clipping")

    @model_validator(mode="after")
    def _schedule_possible(self) -> Self:
        warmup, start, halvings = self.warmup_steps, self.decay_start_step, list(self.halve_at_steps)
        if self.schedule == "exponential" and not self.final_lr_ratio:
            raise ValueError("final_lr_ratio 0 is never reached by schedule 'exponential'; give one above 0, or use 'linear'")
        if start is not None and start < warmup:
            raise ValueError(f"decay_start_step {start} is before the end of the warm-up (warmup_steps {warmup}); raise it, or "
                             "lower warmup_steps")
        if self.schedule == "halving" and not halvings:
            raise ValueError("schedule 'halving' needs halve_at_steps, the steps at which lr is halved; or use 'constant'")
        if halvings != sorted(set(halvings)) or (halvings and halvings[0] < max(1, warmup)):
            raise ValueError(f"halve_at_steps {halvings} must rise, and begin no earlier than the warm-up ends (warmup_steps "
                             f"{warmup}) or step 1; reorder or drop those that do not")
        if self.schedule == "inverse_sqrt" and not warmup:
            raise ValueError("schedule 'inverse_sqrt' with warmup_steps 0 is no learning rate, being lr * sqrt(warmup_steps / "
                             "step); give 1 or more")
        return self

    def check_in_run(self, section: str, steps: int, zero_stage: int) -> None:
        """ValueError, naming `section` of the config, for what a run of `steps` would not read, not reach or not do."""
        for option, (choice, names) in self.READ_BY.items():
            value, chosen, default = getattr(self, option), getattr(self, choice), type(self).model_fields[option].default
            if value != default and chosen not in names:  # a default is in every merged config
                raise ValueError(f"{section}.{option} {value} is not read with {section}.{choice} '{chosen}', only with "
                                 f"{', '.join(names)}; leave it out (default {default})")
        latest = {"decay_start_step": self.decay_start_step or 0, "halve_at_steps": max(self.halve_at_steps, default=0)}
        for option, step in latest.items():
            if step >= steps:
                raise ValueError(f"{section}.{option} {step} is not before the end of the run (train.steps {steps}); lower it")
        if self.name == "adafactor" and zero_stage > 0:
            raise ValueError(f"{section}.name 'adafactor' with deepspeed.zero_stage {zero_stage}: that makes vectors of the "
                             "weights, whose second moment has no factors; use deepspeed.zero_stage 0, or 'adamw'")


class DiscriminatorOptimConfig(OptimConfig):
    """The discriminator's optimizer; its steps count from adversarial.start_step."""

    lr: float = Field(4e-4, gt=0, description="peak learning rate")
    betas: tuple[Beta, Beta] = (0.5, 0.9)
    weight_decay: float = Field(0.0, ge=0, description="on matrices; never on gains, biases and embeddings")
    warmup_steps: int = Field(0, ge=0)
    schedule: Schedule = "constant"


class CheckpointConfig(StrictConfig):
    """Checkpoints to resume from."""

    every_steps: int = Field(500, ge=0, description="steps between checkpoints; 0 = only at the end and on a signal")
    keep_last: int = Field(2, ge=1, description="older ones are deleted")
    resume: Literal["auto", "never", "required"] = Field(
        "auto", description="auto: continue the run folder's newest whole checkpoint, or start fresh and say so")


class DeepSpeedConfig(StrictConfig):
    """What DeepSpeed is asked to do; its JSON is derived from this tree."""

    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="what is sharded over the processes: 0 nothing, 1 optimizer "
                                            "state, 2 and gradients, 3 and parameters")


class RunConfig(StrictConfig):
    """What every training script shares."""

    run_dir: str = Field(description="folder of this run: config, metrics, samples, checkpoints, model")
    seed: int = Field(0, ge=0, lt=1 << 31, description="of weights, data order, augmentation and dropout")
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @model_validator(mode="after")
    def _optimizers_possible(self) -> Self:
        for section, optim in self:
            if isinstance(optim, OptimConfig):
                optim.check_in_run(section, self.train.steps, self.deepspeed.zero_stage)
        return self


class TokenizerTrainConfig(TrainConfig):
    """What only the training of an image tokenizer has."""

    trained_part: Literal["all", "decoder"] = Field("all", description="decoder: codes stay as train.start_from has them, "
                                                    "only the way from codes to pixels learns")
    start_from: str | None = Field(None, description="folder of a trained image tokenizer whose weights are taken over")
    gradient_checkpointing: bool = Field(False, description="keep fewer activations and compute them again: less memory, "
                                         "about a third more time")


class CodebookHealthConfig(StrictConfig):
    """How the codebook is watched."""

    window: int = Field(0, ge=0, description="pictures over which usage and perplexity are counted; 0 = an epoch")
    warn_below: float = Field(0.5, ge=0, le=1, description="share of codes in use below which a warning says what to try")


class TokenizerRunConfig(RunConfig):
    """training/train_tokenizer.py: images -> an image tokenizer."""

    data: DataConfig
    model: SerializeAsAny[ImageTokenizerConfig] = VQGANConfig()
    loss: TokenizerLossConfig = TokenizerLossConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    train: TokenizerTrainConfig = TokenizerTrainConfig()
    discriminator_optim: DiscriminatorOptimConfig = DiscriminatorOptimConfig()
    codebook: CodebookHealthConfig = CodebookHealthConfig()

    @model_validator(mode="before")
    @classmethod
    def _model_of_the_start(cls, values: Any) -> Any:
        """A model that is not described is the one of train.start_from."""
        if not isinstance(values, dict) or not isinstance(values.get("train"), dict):
            return values
        start, model = values["train"].get("start_from"), values.get("model")
        if start is None or (model and not isinstance(model, dict)) or {"kind", "preset"} & set(model or {}):
            return values
        base = read_mapping(resolve_folder(start) / "config.json")
        base.pop("schema_version", None)
        return {**values, "model": merge(base, model or {})}

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
        if self.train.trained_part == "decoder" and not self.train.start_from:
            raise ValueError("train.trained_part 'decoder' needs train.start_from, the tokenizer whose codes are kept")
        own = getattr(self.model, "output", None) == "logit_laplace" and self.train.trained_part != "decoder"
        if not (own or self.loss.l1_weight or self.loss.l2_weight or self.loss.perceptual_weight):
            raise ValueError("loss: no term of the picture has a weight, so there is nothing to learn; set l1_weight, "
                             "l2_weight or perceptual_weight")
        first = self.adversarial.start_step + self.adversarial.head_start_steps
        if self.adversarial.weight and first >= self.train.steps:
            raise ValueError(f"adversarial.start_step + head_start_steps = {first} is not before the end of the run "
                             f"(train.steps {self.train.steps}); lower them, or set adversarial.weight to 0")
        return self


class LayoutConfig(StrictConfig):
    """A coarse grid of classes that models may be given, or sample, before the image tokens."""

    kind: Literal["none", "classes", "colors"] = Field("none", description="classes: from a column of the data; colors: the "
                                                       "picture's own, in 27 classes")
    grid: tuple[int, int] = Field((4, 4), description="rows and columns that are kept")
    column: str = Field("layout", description="column with the classes, in raster order of a square grid; for kind classes")
    classes: int | None = Field(None, ge=2, le=1 << 16, description="number of classes in the column; for kind classes")

    @model_validator(mode="after")
    def _check(self) -> LayoutConfig:
        if min(self.grid) < 1 or max(self.grid) > 64:
            raise ValueError(f"layout.grid {self.grid}: give 1 to 64 rows and columns")
        if (self.kind == "classes") != (self.classes is not None):
            raise ValueError("layout.classes, the number of classes, is for layout.kind classes, which needs it")
        if self.kind != "classes" and self.column != "layout":
            raise ValueError(f"layout.column is for layout.kind classes, not {self.kind}; leave it out")
        return self


class EncodeRunConfig(StrictConfig):
    """training/encode_dataset.py: captioned images + an image tokenizer -> token shards."""

    image_tokenizer: str = Field(description="folder of the image tokenizer")
    data: PicturesConfig
    out: str = Field(description="folder for the token shards")
    layout: LayoutConfig = LayoutConfig()
    splits: list[str] | None = Field(None, description="splits to encode; none = every split of the data")
    batch_size: int = Field(64, ge=1, description="pictures at a time and process")
    shard_rows: int = Field(50_000, ge=1, description="rows per parquet shard")
    threads: int = Field(0, ge=0, description="CPU threads per process; 0 = cores / processes of this machine")


class TextConfig(StrictConfig):
    """What the model reads: ids of a text tokenizer, a class, or the features of a frozen text encoder."""

    kind: Literal["sentencepiece", "classes", "frozen"] = Field(
        "sentencepiece", description="sentencepiece: captions as ids; classes: a row's first caption is its class, one learned "
        "vector each; frozen: features of a pretrained text encoder")
    tokenizer: str | None = Field(None, description="folder of a trained text tokenizer; none = train one on the captions")
    vocab_size: int | None = Field(None, ge=264, le=1 << 20, description="of the one that is trained; none = 2048")
    text_length: int | None = Field(None, ge=2, le=4096, description="ids per caption, the end included; none = 32")
    encoder: str | None = Field(None, description="folder or hub id of the text encoder, for kind frozen")
    feature_cache: str | None = Field(None, description="folder where its features are kept and found again; none = encode "
                                      "each caption whenever it comes")

    @model_validator(mode="after")
    def _only_what_is_read(self) -> TextConfig:
        frozen = self.kind == "frozen"
        if frozen != (self.encoder is not None):
            raise ValueError("text.encoder, the folder or hub id of a text encoder, is for text.kind frozen, which needs it")
        if self.feature_cache and not frozen:
            raise ValueError(f"text.feature_cache is for text.kind frozen, not {self.kind}; leave it out")
        if frozen and (self.tokenizer or self.vocab_size):
            raise ValueError("text.kind frozen has a tokenizer of its own; leave text.tokenizer and text.vocab_size out")
        if self.kind == "classes" and (self.vocab_size or self.text_length):
            raise ValueError("text.kind classes reads one id a class; leave text.vocab_size and text.text_length out")
        if self.tokenizer and (self.vocab_size or self.text_length):
            raise ValueError("text.tokenizer names a trained one, which has its own vocab_size and text_length; leave them out")
        return self


class Seq2SeqRunConfig(RunConfig):
    """training/train_seq2seq.py: token shards -> the caption -> token transformer and the whole model folder."""

    data: TokenDataConfig
    image_tokenizer: str = Field(description="folder of the image tokenizer that made the tokens")
    text: TextConfig = TextConfig()
    model: SerializeAsAny[TransformerSettings] = Field(default_factory=lambda: read_settings({}))
    loss: TokenLossConfig = TokenLossConfig()
    use_layout: bool = Field(True, description="learn the layout before the image, where the token shards have one")
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="chance that a caption is replaced by the null caption")
    token_corruption: float = Field(0.0, ge=0, lt=1, description="share of the tokens fed to the decoder that are replaced by "
                                    "random codes, so that it keeps listening to the caption")
    sample_guidance: float = Field(3.0, ge=0, le=100, description="guidance scale of the sample grids and the exported default")
    sample_top_k: int = Field(256, ge=0, description="top-k of the sample grids and the exported default; 0 = off")

    @field_validator("model", mode="before")
    @classmethod
    def _family(cls, values: Any) -> Any:
        """Read the section of the family that `preset` or `kind` names."""
        return read_settings(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _text_is_predicted_or_not(self) -> Seq2SeqRunConfig:
        predicts = bool(self.model.resolved().get("predict_text", False))
        if predicts != bool(self.loss.text_weight):
            has, lacks = ("model.predict_text is true", "loss.text_weight is 0") if predicts else (
                f"loss.text_weight is {self.loss.text_weight}", "model.predict_text is false")
            raise ValueError(f"{has}, but {lacks}; set both or neither")
        if predicts and self.text.kind != "sentencepiece":
            raise ValueError(f"model.predict_text needs text ids to predict; text.kind {self.text.kind} has none")
        return self

    @model_validator(mode="after")
    def _possible(self) -> Seq2SeqRunConfig:
        if self.train.weight_ema and self.deepspeed.zero_stage == 3:
            raise ValueError("train.weight_ema follows whole weights, which deepspeed.zero_stage 3 shards; use stage 2 or less")
        if self.text.kind == "frozen" and self.data.workers and not self.text.feature_cache:
            raise ValueError("data.workers cannot share a text encoder; name a folder for text.feature_cache, "
                             "or set data.workers to 0")
        return self
