"""Train the caption -> image token transformer on token shards, and export the whole model folder.

CPU:  python training/train_seq2seq.py --config training/recipes/debug_seq2seq.yaml --data.path TOKENS
      --image_tokenizer TOKENIZER_RUN/model --run_dir RUN
real: deepspeed training/train_seq2seq.py --config training/recipes/small_seq2seq.yaml --data.path TOKENS
      --image_tokenizer TOKENIZER_RUN/model --run_dir RUN
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference import LoadedModel, SamplingParams, TextToImage, save_model_folder
from seq2seq import (
    TRANSFORMER_KINDS,
    ClassLabels,
    DecoderOnly,
    FrozenTextEncoder,
    ImageTransformer,
    TextSource,
    TransformerConfig,
)
from seq2seq.layers import recompute_activations
from seq2seq.losses import loss_parts, region_token_weights
from tokenizer_image import load_tokenizer
from tokenizer_image.fingerprint import code_fingerprint
from tokenizer_image.images import image_grid
from tokenloom_common.errors import UserError, run_command
from tokenloom_common.files import write_json_atomic
from training.config.seq2seq import Seq2SeqRunConfig
from training.config.start_folders import IMAGE_FOLDER, TEXT_FOLDER, facts_of_run
from training.data.run_data import open_training_pictures, token_order
from training.data.text_input import cached
from training.data.tokens.shards import TokenShards, check_same_tokenizer
from training.data.visits.loader import batch_loader
from training.data.visits.on_the_fly import (
    CollatePictures,
    PictureBatch,
    PictureTokens,
    PictureTokenVisits,
    with_tokens,
)
from training.data.visits.order import MicroBatches
from training.data.visits.tokens import Captions, CollateTokens, TokenBatch, TokenVisits
from training.engine.deepspeed_engine import Engine
from training.engine.deepspeed_json import deepspeed_json
from training.engine.launch import resolve_precision
from training.engine.optim import build_optimizer
from training.engine.processes import Processes
from training.engine.weight_average import average_state, restore_average, weight_average
from training.evaluation.plots import plot_positions
from training.evaluation.token_loss import HeldOut, validation_loss
from training.loop.drops import PictureDrops
from training.loop.loop import Task
from training.loop.script import train_from_command_line
from training.objectives.seq2seq import check_losses
from training.planning.fits import refuse_what_cannot_fit
from training.planning.flops import forward_flops
from training.planning.plan import seq2seq_plan
from training.runs.cards import seq2seq_card
from training.runs.metrics import sample_path
from training.runs.random_state import seed_everything
from training.runs.retention import Measured
from training.runs.run_state import RunState
from training.warm_start.text_encoder import check_text_start, take_text_encoder
from training.warm_start.transformer import (
    check_codes,
    check_start,
    image_tokenizer_folder,
    model_of_start,
    open_start,
    text_source_of,
)

log = logging.getLogger("training.train_seq2seq")  # under a launcher __name__ is "__main__"

SAMPLE_PICTURES = 8


class Seq2SeqTraining:
    """One run: the transformer, its tokenizers, its data and what the loop needs of them."""

    def __init__(self, config: Seq2SeqRunConfig, group: Processes) -> None:
        self.config, self.group = config, group
        precision = resolve_precision(config, group.device)
        deepspeed_json(config, group.world_size, precision, parameters=1)  # a batch that cannot be divided is refused now
        kept = self._kept_text()
        start = group.first_then_others(lambda: open_start(config)) if kept is None else None
        self.image_tokenizer_folder = image_tokenizer_folder(config, start)
        self.image_tokenizer = group.first_then_others(lambda: load_tokenizer(self.image_tokenizer_folder))
        self.fingerprint = code_fingerprint(self.image_tokenizer)
        if start is not None:
            group.first_does(lambda: check_codes(start, self.image_tokenizer, self.fingerprint, self.image_tokenizer_folder))
        self.shards = self._open(config.data.split)
        self.held_out = self._open(config.data.validation_split) if config.data.validation_split else None
        self.order = token_order(config.data, self.shards, config.seed)
        self.drops = (PictureDrops(config.data, self.shards.source, group) if isinstance(self.shards, PictureTokens) else None)
        loaded = config.init_from is not None or config.text.kind == FrozenTextEncoder.kind
        together = group.first_then_others if loaded else group.first_does
        self.text_source: TextSource = together(lambda: text_source_of(config, self.shards, start, kept))
        model_config = self._model_config()
        if start is not None:
            group.first_does(lambda: check_start(start, model_config))
        check_losses(config, model_config)
        group.first_does(lambda: refuse_what_cannot_fit(
            seq2seq_plan(config, precision, model_config, self.image_tokenizer.config), group))
        start_from = config.text.start_from
        if start_from and kept is None:
            group.first_does(lambda: check_text_start(model_config, start_from))
        begun = group.first_then_others(lambda: model_of_start(model_config, start)) if start is not None else None
        self.run_state = RunState(config, group, self._facts(model_config))
        self.run_state.prepare()
        group.first_does(self._keep_tokenizers)
        self.visits, self.collate = self._visits(self._classes())
        seed_everything(config.seed, 0)  # the same weights on every process
        self.model = begun if begun is not None else TRANSFORMER_KINDS[config.model.kind](model_config)
        recompute_activations(self.model, config.train.gradient_checkpointing)
        if start_from and self.run_state.resume_from is None:
            if kept is not None:
                raise UserError(f"{config.run_dir}: none of its checkpoints is whole, and its text tokenizer need not be "
                                "that of text.start_from; give another run_dir")
            group.first_then_others(lambda: take_text_encoder(self.model, start_from, config.text.encoder) and None)
        self.average = (weight_average(self.model, config.train.weight_ema, group.device)
                        if config.train.weight_ema and group.is_first else None)
        self.engine = Engine(self.model, build_optimizer(self.model, config.optim), config, group, precision)
        self._measured_at: dict[int, HeldOut] = {}  # step -> what the held-out split said
        seed_everything(config.seed, group.rank)

    def _open(self, split: str) -> TokenShards | PictureTokens:
        data = self.config.data
        if data.on_the_fly:
            self.image_tokenizer.config.check_encodes(self.image_tokenizer_folder)
            source = self.group.first_then_others(lambda: open_training_pictures(data, split))
            return PictureTokens(source, self.image_tokenizer, self.fingerprint)
        shards = self.group.first_then_others(lambda: TokenShards(data.path, split))
        check_same_tokenizer(shards.index, data.path, self.image_tokenizer.codebook_size, self.image_tokenizer.grid,
                             self.fingerprint, self.image_tokenizer_folder)
        return shards

    def _visits(self, first_caption: bool) -> tuple[Any, CollateTokens | CollatePictures]:
        """The data as a loader reads it, and what makes its batches."""
        config = self.config
        if isinstance(self.shards, PictureTokens):
            self.image_tokenizer = self.image_tokenizer.to(self.group.device)
            return (PictureTokenVisits(self.shards.source, self.image_tokenizer.config.resolution, config.seed,
                                       config.data.horizontal_flip, config.caption_dropout, first_caption),
                    CollatePictures(self._captions()))
        return (TokenVisits(self.shards, config.seed, config.caption_dropout, config.token_corruption, first_caption,
                            config.use_layout), CollateTokens(self._captions()))

    def _facts(self, model: TransformerConfig) -> dict[str, Any]:
        """What a checkpoint must share with the run that continues it."""
        facts: dict[str, Any] = {"model": {"kind": model.kind, **model.plain()}, "data rows": len(self.shards)}
        if self.config.train.weight_ema:
            facts["weight_ema"] = True
        if self.config.init_from:
            facts["init_from"] = self.config.init_from
        if self.config.text.start_from:
            facts["text.start_from"] = self.config.text.start_from
        if self.config.optim.name != "adamw":
            facts["optim.name"] = self.config.optim.name
        return facts | self.order.facts()

    def _kept_text(self) -> Path | None:
        """The text tokenizer of the run that is continued."""
        run = Path(self.config.run_dir)
        return None if facts_of_run(run, self.config.checkpoint.resume) is None else run / TEXT_FOLDER

    def _keep_tokenizers(self) -> None:
        """In the run folder, so that a run which is continued needs neither its captions nor init_from."""
        run = self.run_state.run_dir
        if not (run / TEXT_FOLDER).exists():
            self.text_source.save_pretrained(run / TEXT_FOLDER)
        if self.config.image_tokenizer is None and not (run / IMAGE_FOLDER).exists():
            self.image_tokenizer.save_pretrained(run / IMAGE_FOLDER)

    def _classes(self) -> bool:
        return isinstance(self.text_source, ClassLabels)

    def _captions(self) -> Captions:
        """What gives the batches their text: the source itself, or its features from disk."""
        cache = self.config.text.feature_cache
        if not isinstance(self.text_source, FrozenTextEncoder) or cache is None:
            return self.text_source
        source = self.text_source
        wanted = [*self.shards.all_captions(), *(self.held_out.all_captions() if self.held_out else [])]
        self.group.first_does(lambda: cached(source, Path(cache), wanted, may_write=True) and None)
        return cached(source, Path(cache), wanted, may_write=False)

    def _model_config(self) -> TransformerConfig:
        layout = self.shards.index.layout
        return self.config.model.build({
            "text_vocab_size": self.text_source.vocab_size, "text_feature_width": self.text_source.feature_width,
            "text_length": self.text_source.config.text_length, "codebook_size": self.image_tokenizer.codebook_size,
            "grid": self.image_tokenizer.grid, "tokenizer_fingerprint": self.fingerprint,
            **({"layout_kind": layout.kind, "layout_classes": layout.classes, "layout_grid": layout.grid}
               if layout and self.config.use_layout else {})})

    def task(self) -> Task:
        """This run as the training loop sees it."""
        return Task("train seq2seq", [self.engine], self.batches, self.train, metrics=self.metrics, sample=self.sample,
                    problem=lambda: self.drops.problem if self.drops else None, state=lambda: average_state(self.average),
                    restore=lambda state: restore_average(self.average, state), order=self.order, key=self.shards.key,
                    validate=self.validate, tokens_per_item=self.model.config.num_tokens,
                    # encoding on the fly is computed too, and not counted
                    forward_flops=None if self.drops else lambda: forward_flops(self.model.config))

    def metrics(self) -> dict[str, float]:
        """Unusable pictures, where there are pictures."""
        return {"dropped_items": self.drops.total()} if self.drops else {}

    def batches(self, first_step: int) -> Iterable[TokenBatch | PictureBatch]:
        """This process's micro-batches from `first_step` on."""
        train = self.config.train
        order = MicroBatches(self.order, train.batch_size, train.accumulation, self.group.rank, self.group.world_size,
                             first_step, train.steps)
        return batch_loader(self.visits, order, self.config.data.workers, self.collate)

    def _with_tokens(self, batch: TokenBatch | PictureBatch) -> TokenBatch:
        if isinstance(batch, TokenBatch):
            return batch
        assert self.drops is not None
        self.drops.count(batch.dropped)
        return with_tokens(batch, self.image_tokenizer, self.config.seed, self.config.token_corruption)

    def train(self, visits: TokenBatch | PictureBatch, step: int) -> dict[str, Tensor]:
        """One micro-batch: gradients, and an optimizer step at the end of a window -> the loss, and its parts by name."""
        batch = self._with_tokens(visits)
        device, loss = self.group.device, self.config.loss
        text, mask = (part.to(device) for part in batch.text)
        tokens = batch.image_tokens.to(device)
        layout = None if batch.layout is None else batch.layout.to(device)
        logits = self.engine(text, mask, batch.input_tokens.to(device), *([] if layout is None else [layout]))
        weights = None
        if layout is not None and loss.region_weights:
            weights = region_token_weights(layout, self.model.config.layout_grid, self.model.config.grid, loss.region_weights)
        targets = None
        if isinstance(self.model, DecoderOnly) and self.model.config.predict_text:
            targets = self.model.text_targets(text, mask)
            mask = mask if self.model.config.text_padding == "masked" else torch.ones_like(mask)
        parts = loss_parts(logits, loss, tokens, weights, layout, targets, mask)
        total = torch.stack([term * weight for term, weight in parts.values()]).sum()
        terms = {name: term.detach() for name, (term, _) in parts.items()}
        self.engine.backward(total, step + 1, terms)
        self.engine.step(step + 1)
        if self.average is not None and self.engine.window_applied:
            self.average.update_parameters(self.model)
        return {"loss": total.detach(), **(terms if len(terms) > 1 or loss.image_weight != 1 else {})}

    def full_model(self) -> ImageTransformer:
        """A float32 copy on the CPU with the whole current weights, or their average. All processes must call it."""
        state = self.engine.full_state()
        if self.average is not None and int(self.average.n_averaged):
            state = self.average.module.state_dict()
        model = type(self.model)(self.model.config)
        model.load_state_dict(state)
        return model.eval()

    def pipeline(self, model: ImageTransformer) -> TextToImage:
        """A sampler around the current weights."""
        image_tokenizer, device = self.image_tokenizer.to(self.group.device), self.group.device
        return TextToImage(LoadedModel(image_tokenizer, model.to(device), self.text_source, self.generation(),
                                       self.run_state.run_dir))

    def generation(self) -> SamplingParams:
        """Sampling defaults of this run's exports and grids."""
        config = self.config
        return SamplingParams(guidance_scale=config.sample_guidance, temperature=config.sample_temperature,
                              top_k=config.sample_top_k)

    def sample(self, step: int) -> None:
        """samples/step-…png: pictures sampled for fixed captions and seeds."""
        model = self.full_model()
        if not self.group.is_first:
            return
        stride = max(1, len(self.shards) // SAMPLE_PICTURES)
        given = [self.shards.captions(row) for row in range(0, len(self.shards), stride)][:SAMPLE_PICTURES]
        captions = [several[0] for several in given if several]  # a row of a stream may have none that can be used
        result = self.pipeline(model).generate(captions, seed=0)
        path = sample_path(self.run_state.run_dir, step)
        image_grid(result.images, columns=len(captions)).save(path)
        write_json_atomic(path.with_name("captions.json"), captions)

    def validate(self, step: int) -> Measured:
        """The held-out loss after a step. All processes must call it."""
        model = self.full_model()
        held_out: HeldOut = self.group.first_does(lambda: self._measure(model))
        self._measured_at = {step: held_out}
        return Measured("validation_loss", held_out.loss)

    def _measure(self, model: ImageTransformer) -> HeldOut:
        assert self.held_out is not None
        return validation_loss(model.to(self.group.device), self.held_out, self.collate, self.config.seed,
                               first_caption=self._classes())

    def finish(self) -> None:
        """Measure the held-out split and export run_dir/model."""
        model = self.full_model()
        if self.drops:
            self.drops.say()
        if not self.group.is_first:
            return
        held_out = None
        if self.held_out is not None:
            split, run_dir = self.config.data.validation_split or "", self.run_state.run_dir
            held_out = self._measured_at.get(self.config.train.steps) or self._measure(model)
            write_json_atomic(run_dir / "validation.json", held_out.plain(split, model.config.grid))
            plot_positions(held_out.by_position, model.config.grid, run_dir / "positions.png")
            log.info("held-out loss: %.4f nats a token", held_out.loss)
        folder = save_model_folder(self.run_state.run_dir / "model", self.image_tokenizer.cpu(), model.cpu(),
                                   self.text_source, self.generation(),
                                   seq2seq_card(self.config, model.config, len(self.shards),
                                              held_out.loss if held_out else None))
        log.info("model folder: %s", folder)


def run(argv: Sequence[str] | None) -> int:
    """Train from command-line arguments."""
    return train_from_command_line(argv, Seq2SeqRunConfig, Seq2SeqTraining, "train_seq2seq.py", __doc__ or "")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: errors become one line and an exit code."""
    return run_command(run, argv, "train_seq2seq.py")


if __name__ == "__main__":
    sys.exit(main())
