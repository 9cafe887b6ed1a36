"""The config tree of the training scripts: defaults < YAML recipe < dotted command-line overrides.

An unknown key is an error that names the nearest valid one; the merged config is written beside the run.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

from seq2seq.config import PRESETS as SEQ2SEQ_PRESETS
from tokenizer_image import KINDS, ImageTokenizerConfig, TokenizerLossConfig, VQGANConfig, preset
from tokenizer_image.adversarial import AdversarialConfig
from tokenloom_common.config import StrictConfig, explain, merge, read_mapping
from tokenloom_common.errors import choose, nearest_name
from tokenloom_common.pretrained import resolve_folder

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
    threads: int = Field(0, ge=0, description="CPU threads per process; 0 = cores / processes of this machine")


class OptimConfig(StrictConfig):
    """AdamW with warm-up."""

    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.05, ge=0, description="on matrices; never on gains, biases and embeddings")
    warmup_steps: int = Field(50, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    final_lr_ratio: float = Field(0.05, ge=0, le=1, description="lr at the end / peak lr, for cosine")
    gradient_clipping: float = Field(1.0, ge=0, description="largest global gradient norm; 0 = no clipping")


class DiscriminatorOptimConfig(OptimConfig):
    """AdamW of the discriminator; its steps count from adversarial.start_step."""

    lr: float = Field(4e-4, gt=0, description="peak learning rate")
    betas: tuple[float, float] = (0.5, 0.9)
    weight_decay: float = Field(0.0, ge=0, description="on matrices; never on gains, biases and embeddings")
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["cosine", "constant"] = "constant"


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


class TokenizerTrainConfig(TrainConfig):
    """What only the training of an image tokenizer has."""

    trained_part: Literal["all", "decoder"] = Field("all", description="decoder: codes stay as train.start_from has them, "
                                                    "only the way from codes to pixels learns")
    start_from: str | None = Field(None, description="folder of a trained image tokenizer whose weights are taken over")
    gradient_checkpointing: bool = Field(False, description="keep fewer activations and compute them again: less memory, "
                                         "about a third more time")
    weight_ema: float = Field(0.0, ge=0, lt=1, description="decay of a moving average of the weights, which is then what is "
                              "sampled, measured and exported (in bfloat16: of the rounded weights); 0 = none")


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


class EncodeRunConfig(StrictConfig):
    """training/encode_dataset.py: captioned images + an image tokenizer -> token shards."""

    image_tokenizer: str = Field(description="folder of the image tokenizer")
    data: PicturesConfig
    out: str = Field(description="folder for the token shards")
    splits: list[str] | None = Field(None, description="splits to encode; none = every split of the data")
    batch_size: int = Field(64, ge=1, description="pictures at a time and process")
    shard_rows: int = Field(50_000, ge=1, description="rows per parquet shard")
    threads: int = Field(0, ge=0, description="CPU threads per process; 0 = cores / processes of this machine")


class TextConfig(StrictConfig):
    """The text tokenizer: an existing one, or one trained on the captions of this run."""

    tokenizer: str | None = Field(None, description="folder of a trained text tokenizer; none = train one")
    vocab_size: int | None = Field(None, ge=264, le=1 << 20, description="of the one that is trained; none = 2048")
    text_length: int | None = Field(None, ge=2, le=4096, description="its ids per caption, END included; none = 32")

    @model_validator(mode="after")
    def _one_of_two(self) -> TextConfig:
        if self.tokenizer and (self.vocab_size or self.text_length):
            raise ValueError("text.tokenizer names a trained one, which has its own vocab_size and text_length; leave them out")
        return self


class Seq2SeqModelConfig(StrictConfig):
    """Size of the transformer; what follows from the tokenizers is filled in. A preset gives defaults for the rest."""

    preset: str | None = Field("small", description=f"one of {', '.join(SEQ2SEQ_PRESETS)}")
    width: int | None = None
    heads: int | None = None
    head_dim: int | None = None
    kv_heads: int | None = None
    encoder_layers: int | None = None
    decoder_layers: int | None = None
    feedforward: Literal["swiglu", "gelu"] | None = None
    feedforward_multiplier: float | None = None
    norm: Literal["rmsnorm", "layernorm"] | None = None
    qk_norm: bool | None = None
    rotary: Literal["2d", "1d", "none"] | None = None
    learned_positions: bool | None = None
    dropout: float | None = None

    def resolved(self) -> dict[str, Any]:
        """The preset's values, overridden by those given here."""
        base = choose(SEQ2SEQ_PRESETS, self.preset, "model.preset") if self.preset else {}
        return {**base, **self.model_dump(exclude={"preset"}, exclude_none=True)}

    @model_validator(mode="after")
    def _known_preset(self) -> Seq2SeqModelConfig:
        if self.preset is not None and self.preset not in SEQ2SEQ_PRESETS:
            raise ValueError(f"unknown model.preset '{self.preset}'{nearest_name(self.preset, SEQ2SEQ_PRESETS)}")
        return self


class Seq2SeqRunConfig(RunConfig):
    """training/train_seq2seq.py: token shards -> the caption -> token transformer and the whole model folder."""

    data: TokenDataConfig
    image_tokenizer: str = Field(description="folder of the image tokenizer that made the tokens")
    text: TextConfig = TextConfig()
    model: Seq2SeqModelConfig = Seq2SeqModelConfig()
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="chance that a caption is replaced by the null caption")
    token_corruption: float = Field(0.0, ge=0, lt=1, description="share of the tokens fed to the decoder that are replaced by "
                                    "random codes, so that it keeps listening to the caption")
    sample_guidance: float = Field(3.0, ge=0, le=100, description="guidance scale of the sample grids and the exported default")
    sample_top_k: int = Field(256, ge=0, description="top-k of the sample grids and the exported default; 0 = off")
