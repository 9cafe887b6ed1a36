"""Train the caption -> image token transformer on token shards, and export the whole model folder.

CPU:  python training/train_seq2seq.py --config training/recipes/debug_seq2seq.yaml
      --data.path TOKENS --image_tokenizer TOKENIZER_RUN/model --run_dir RUN
real: deepspeed training/train_seq2seq.py --config training/recipes/small_seq2seq.yaml
      --data.path TOKENS --image_tokenizer TOKENIZER_RUN/model --run_dir RUN
"""

from __future__ import annotations

import sys

from training.places import check_feature_cache, refuse_early

if __name__ == "__main__":
    refuse_early("train_seq2seq.py")  # before the imports below, which take seconds

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from inference import LoadedModel, SamplingParams, TextToImage, save_model_folder
from seq2seq import TRANSFORMER_KINDS, ClassLabels, ImageTransformer, TextBatch
from seq2seq.layers import recompute_activations
from tokenizer_image.images import image_grid
from tokenloom_common.errors import UserError
from tokenloom_common.files import write_json_atomic
from training.config.seq2seq import Seq2SeqRunConfig
from training.config.start_folders import IMAGE_FOLDER, TEXT_FOLDER
from training.data.visits.on_the_fly import (
    CollateOnTheFly,
    OnTheFlyBatch,
    OnTheFlyTokens,
    OnTheFlyVisits,
    tokenize_batch,
)
from training.data.visits.tokens import CollateTokens, TokenBatch, TokenVisits
from training.engine.processes import Processes
from training.evaluation.plots import plot_positions
from training.evaluation.token_loss import HeldOut, validation_loss
from training.loop.loop import Task
from training.loop.script import train_from_command_line
from training.loop.seq2seq_inputs import Seq2SeqInputs
from training.loop.trained import Training, batch_captions
from training.objectives.seq2seq import seq2seq_loss
from training.planning.fits import refuse_what_cannot_fit
from training.planning.flops import forward_flops
from training.planning.plan import seq2seq_plan
from training.runs.cards import seq2seq_card
from training.runs.metrics import sample_path
from training.runs.random_state import seed_everything
from training.runs.retention import Measured
from training.runs.run_state import RunState
from training.warm_start.code_tables import start_code_tables
from training.warm_start.text_encoder import check_text_start, take_text_encoder
from training.warm_start.transformer import model_of_start

log = logging.getLogger("training.train_seq2seq")  # under a launcher __name__ is "__main__"

SAMPLE_PICTURES = 8  # captions of a sample grid


class Seq2SeqTraining(Training):
    """One run: the transformer, its tokenizers, its data and what the loop needs of them."""

    config: Seq2SeqRunConfig

    def __init__(self, config: Seq2SeqRunConfig, group: Processes) -> None:
        super().__init__(config, group)
        self.micro_batch_size()  # a batch that cannot be divided is refused now
        group.first_does(lambda: check_feature_cache(config.text.feature_cache))

        self.inputs = Seq2SeqInputs(config, group)
        self.image_tokenizer = self.inputs.image_tokenizer
        self.text_source = self.inputs.text_source
        self.held_out = self.inputs.held_out
        self.order, self.drops = self.inputs.order, self.inputs.drops
        self._check_memory_and_text_start()

        # before the run folder is touched, since a damaged file refuses the run
        warm_model = self._warm_start()
        self.run_state = RunState(config, group, self._facts())
        self.run_state.prepare()
        group.first_does(self._keep_tokenizers)

        self._open_visits()
        self._build(warm_model)

    # ---- set-up

    def _check_memory_and_text_start(self) -> None:
        model_config, config = self.inputs.model_config, self.config

        def check_memory() -> None:
            plan = seq2seq_plan(config, self.precision, model_config, self.image_tokenizer.config)
            refuse_what_cannot_fit(plan, self.group)

        self.group.first_does(check_memory)
        start_from = config.text.start_from
        if start_from and self.inputs.kept_text is None:
            self.group.first_does(lambda: check_text_start(model_config, start_from))

    def _warm_start(self) -> ImageTransformer | None:
        """Load the model of init_from; None for fresh weights, or a run that is continued."""
        start = self.inputs.start
        if start is None:
            return None
        return self.group.first_then_others(lambda: model_of_start(self.inputs.model_config, start))

    def _facts(self) -> dict[str, Any]:
        """Return the facts that a checkpoint must share with the run that continues it."""
        config, model = self.config, self.inputs.model_config
        facts: dict[str, Any] = {"model": {"kind": model.kind, **model.plain()},
                                 "data rows": len(self.inputs.data)}
        if config.train.weight_ema:
            facts["weight_ema"] = True
        if config.init_from:
            facts["init_from"] = config.init_from
        if config.text.start_from:
            facts["text.start_from"] = config.text.start_from
        if config.optim.name != "adamw":
            facts["optim.name"] = config.optim.name
        return facts | self.order.facts()

    def _keep_tokenizers(self) -> None:
        """Save them in the run folder: a continued run needs neither captions nor init_from."""
        run = self.run_state.run_dir
        if not (run / TEXT_FOLDER).exists():
            self.text_source.save_pretrained(run / TEXT_FOLDER)
        if self.config.image_tokenizer is None and not (run / IMAGE_FOLDER).exists():
            self.image_tokenizer.save_pretrained(run / IMAGE_FOLDER)

    def _open_visits(self) -> None:
        config, data = self.config, self.inputs.data
        held_out = [] if self.held_out is None else [self.held_out]
        captions = batch_captions(self.text_source, config.text, [data, *held_out], self.group)
        if isinstance(data, OnTheFlyTokens):
            # it encodes every batch there, after the loader's workers have read the images
            self.image_tokenizer = self.image_tokenizer.to(self.group.device)
            self.visits = OnTheFlyVisits(data.source, self.image_tokenizer.config.resolution,
                                         config.seed, config.data.horizontal_flip,
                                         config.caption_dropout, self._reads_classes())
            self.collate = CollateOnTheFly(captions)
        else:
            self.visits = TokenVisits(data, config.seed, config.caption_dropout,
                                      config.token_corruption, self._reads_classes(),
                                      config.use_layout)
            self.collate = CollateTokens(captions)

    def _reads_classes(self) -> bool:
        return isinstance(self.text_source, ClassLabels)

    def _build(self, warm_model: ImageTransformer | None) -> None:
        config, model_config = self.config, self.inputs.model_config
        seed_everything(config.seed, 0)  # the same weights on every process
        if warm_model is None:
            warm_model = TRANSFORMER_KINDS[model_config.kind](model_config)
            if config.code_tables_from_codebook:
                start_code_tables(warm_model, self.image_tokenizer)
        self.model: ImageTransformer = warm_model
        recompute_activations(self.model, config.train.gradient_checkpointing)
        self._take_text_encoder()
        self.start_engine(self.model)
        seed_everything(config.seed, self.group.rank)  # dropout differs between the processes

    def _take_text_encoder(self) -> None:
        """Copy the text encoder of text.start_from into the fresh model of a run that begins."""
        start_from, encoder = self.config.text.start_from, self.config.text.encoder
        if not start_from or self.run_state.resume_from is not None:
            return
        if self.inputs.kept_text is not None:
            raise UserError(f"{self.config.run_dir}: none of its checkpoints is whole, and its "
                            "text tokenizer need not be that of text.start_from; give another "
                            "run_dir")

        self.group.first_then_others(lambda: take_text_encoder(self.model, start_from, encoder))

    # ---- training

    def task(self) -> Task:
        """The run as the training loop sees it."""
        # encoding on the fly is computed too, and not counted
        flops = None if self.drops else lambda: forward_flops(self.model.config)
        return Task("train seq2seq", [self.engine], self.batches, self.train, metrics=self.metrics,
                    sample=self.sample, problem=self.problem, state=self.state,
                    restore=self.restore, order=self.order, key=self.inputs.data.key,
                    validate=self.validate, tokens_per_item=self.model.config.num_tokens,
                    forward_flops=flops)

    def train(self, visits: TokenBatch | OnTheFlyBatch, step: int) -> dict[str, Tensor]:
        """Learn from one micro-batch; a step at the end of a window -> the loss and its parts."""
        batch = self._on_device(self._with_tokens(visits))
        total, terms = seq2seq_loss(self.engine, self.model, self.config.loss, batch)
        self.engine.backward(total, step + 1, terms)
        self.engine.step(step + 1)
        self.update_average()

        loss = {"loss": total.detach()}
        # a single term of weight 1 would only repeat the loss in every log line
        is_the_loss = len(terms) == 1 and self.config.loss.image_weight == 1
        return loss if is_the_loss else loss | terms

    def _with_tokens(self, batch: TokenBatch | OnTheFlyBatch) -> TokenBatch:
        if isinstance(batch, TokenBatch):
            return batch
        assert self.drops is not None
        self.drops.count(batch.dropped)
        config = self.config
        return tokenize_batch(batch, self.image_tokenizer, config.seed, config.token_corruption)

    def _on_device(self, batch: TokenBatch) -> TokenBatch:
        device = self.group.device
        text = TextBatch(batch.text.text_input.to(device), batch.text.text_mask.to(device))
        layout = None if batch.layout is None else batch.layout.to(device)
        return TokenBatch(text, batch.image_tokens.to(device), batch.input_tokens.to(device),
                          layout)

    # ---- samples, measurements, export

    def full_model(self) -> ImageTransformer:
        """Return a float32 copy on the CPU with the current weights, or their average."""
        state = self.current_weights()
        model = type(self.model)(self.model.config)
        model.load_state_dict(state)
        return model.eval()

    def pipeline(self, model: ImageTransformer) -> TextToImage:
        """Return a sampler around `model`."""
        device = self.group.device
        return TextToImage(LoadedModel(self.image_tokenizer.to(device), model.to(device),
                                       self.text_source, self.generation(), self.run_state.run_dir))

    def generation(self) -> SamplingParams:
        """Sampling defaults of this run's exports and grids."""
        config = self.config
        return SamplingParams(guidance_scale=config.sample_guidance,
                              temperature=config.sample_temperature, top_k=config.sample_top_k)

    def sample(self, step: int) -> None:
        """Write samples/step-…png: images sampled for fixed captions and seeds."""
        model = self.full_model()
        if not self.group.is_first:
            return

        data = self.inputs.data  # spread over it, and the same captions in every grid
        stride = max(1, len(data) // SAMPLE_PICTURES)
        of_rows = [data.captions(row) for row in range(0, len(data), stride)][:SAMPLE_PICTURES]
        # a row of a stream may have none that can be used
        captions = [of_row[0] for of_row in of_rows if of_row]

        result = self.pipeline(model).generate(captions, seed=0)
        path = sample_path(self.run_state.run_dir, step)
        image_grid(result.images, columns=len(captions)).save(path)
        write_json_atomic(path.with_name("captions.json"), captions)

    def validate(self, step: int) -> Measured:
        """Measure the held-out loss after a step."""
        model = self.full_model()
        held_out = self.group.first_does(lambda: self.held_out_report(model, step))
        return Measured("validation_loss", held_out.loss)

    def measure(self, model: ImageTransformer, quiet: bool = True) -> HeldOut:
        """Measure the loss of `model` on the held-out split."""
        assert self.held_out is not None
        return validation_loss(model.to(self.group.device), self.held_out, self.collate,
                               self.config.seed, first_caption=self._reads_classes())

    def finish(self) -> None:
        """Measure the held-out split and export run_dir/model."""
        model = self.full_model()
        if self.drops:
            self.drops.say()
        if not self.group.is_first:
            return

        run_dir, held_out_loss = self.run_state.run_dir, None
        if self.held_out is not None:
            held_out: HeldOut = self.held_out_report(model, self.config.train.steps)
            held_out_loss = held_out.loss
            split, grid = self.config.data.validation_split or "", model.config.grid
            write_json_atomic(run_dir / "validation.json", held_out.plain(split, grid))
            plot_positions(held_out.by_position, grid, run_dir / "positions.png")
            log.info("held-out loss: %.4f nats a token", held_out_loss)

        card = seq2seq_card(self.config, model.config, len(self.inputs.data), held_out_loss)
        folder = save_model_folder(run_dir / "model", self.image_tokenizer.cpu(), model.cpu(),
                                   self.text_source, self.generation(), card)
        log.info("model folder: %s", folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Train from command-line arguments; errors become one line and an exit code."""
    return train_from_command_line(argv, Seq2SeqRunConfig, Seq2SeqTraining, "train_seq2seq.py",
                                   __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
