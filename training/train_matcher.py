"""Train a matcher, a small contrastive image-text model, on captioned images.

CPU:  python training/train_matcher.py --config training/recipes/debug_matcher.yaml
      --data.path DIR --run_dir RUN
real: deepspeed training/train_matcher.py --config training/recipes/emoji_matcher.yaml
      --data.path DIR --run_dir RUN

A caption is told from the others of its own process's micro-batch, which are
train.batch_size / (processes x train.accumulation). The text tower can start a transformer's.
"""

# Axes: B batch, S pixels of a side, T text ids, M hidden ids

from __future__ import annotations

import sys

from training.places import refuse_early

if __name__ == "__main__":
    refuse_early("train_matcher.py")  # before the imports below, which take seconds

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.scoring.matcher import Matcher, MatcherConfig
from inference.scoring.matcher_folder import MatcherScorer, save_matcher_folder
from seq2seq import FrozenTextEncoder, TextSource, TextTokenizer
from seq2seq.layers import recompute_activations
from tokenloom_common.errors import UserError
from tokenloom_common.files import write_json_atomic
from training.config.matcher import MatcherRunConfig
from training.config.start_folders import TEXT_FOLDER
from training.data.run_data import image_order, open_training_images
from training.data.sources.captioned_images import CaptionedImages
from training.data.text_input import choose_text_source
from training.data.visits.captioned import CaptionedBatch, CaptionedVisits, CollateCaptioned
from training.engine.launch import DTYPES
from training.engine.processes import Processes
from training.evaluation.plots import plot_curves
from training.evaluation.retrieval import evaluate_retrieval
from training.loop.drops import PictureDrops
from training.loop.loop import Task
from training.loop.script import train_from_command_line
from training.loop.trained import Training, batch_captions, open_held_out_pictures, with_prefix
from training.objectives.matcher import (
    MatcherOutputs,
    MatcherWithTextHead,
    batch_accuracy,
    matcher_loss,
)
from training.planning.fits import refuse_what_cannot_fit
from training.planning.flops import matcher_forward_flops
from training.planning.plan import matcher_plan
from training.runs.cards import matcher_card
from training.runs.metrics import read_metrics
from training.runs.random_state import seed_everything
from training.runs.retention import Measured
from training.runs.run_state import RunState

log = logging.getLogger("training.train_matcher")  # under a launcher __name__ is "__main__"

MATCHER = "matcher."  # prefix of the matcher's own parameters; the others are of the text head


class MatcherTraining(Training):
    """One run: the matcher, its text input, its data and what the loop needs of them."""

    config: MatcherRunConfig

    def __init__(self, config: MatcherRunConfig, group: Processes) -> None:
        super().__init__(config, group)
        group.first_does(self._check_batch)

        self.source = group.first_then_others(
            lambda: open_training_images(config.data, config.data.split))
        self.held_out: CaptionedImages | None = open_held_out_pictures(config.data, group)
        self.drops: PictureDrops = PictureDrops(config.data, self.source, group)
        self.order = image_order(config.data, self.source, config.seed)
        self.text_source = self._open_text_source()
        model_config = self._model_config()
        group.first_does(lambda: refuse_what_cannot_fit(
            matcher_plan(config, self.precision, model_config), group))

        self.run_state = RunState(config, group, self._facts(model_config))
        self.run_state.prepare()
        group.first_does(self._keep_text_source)  # after prepare, which may put an old one aside

        self._open_visits(model_config)
        self._build(model_config)

    # ---- set-up

    def _check_batch(self) -> None:
        """Refuse a batch that cannot be divided, or that leaves nothing to tell a caption from."""
        if self.micro_batch_size() < 2:
            raise UserError(f"train.batch_size {self.config.train.batch_size} leaves a process "
                            "one picture at a time, and a caption is told from those of other "
                            "pictures; raise it, or lower train.accumulation")

    def _open_text_source(self) -> TextSource:
        # a tokenizer that is trained on the captions is sent to the others; an encoder, each
        # process loads itself
        is_loaded = self.config.text.kind == FrozenTextEncoder.kind
        run = self.group.first_then_others if is_loaded else self.group.first_does
        return run(self._choose_text_source)

    def _choose_text_source(self) -> TextSource:
        config, run_dir = self.config, Path(self.config.run_dir)
        # enough to know where the text source lies: RunState checks the checkpoints later
        is_continued = config.checkpoint.resume != "never" and (run_dir / "latest.json").is_file()
        source = choose_text_source(config.text, self.source,
                                    run_dir / TEXT_FOLDER if is_continued else None)
        if config.loss.mlm_weight and source.kind != TextTokenizer.kind:
            raise UserError("loss.mlm_weight hides ids of a SentencePiece tokenizer, and "
                            f"text.tokenizer {config.text.tokenizer} is of kind {source.kind}; "
                            "set it to 0, or leave text.tokenizer out")
        return source

    def _model_config(self) -> MatcherConfig:
        source = self.text_source
        return self.config.model.build({
            "text_vocab_size": source.vocab_size, "text_feature_width": source.feature_width,
            "text_length": source.config.text_length})

    def _facts(self, model: MatcherConfig) -> dict[str, Any]:
        """Return the facts that a checkpoint must share with the run that continues it."""
        facts: dict[str, Any] = {"model": {"kind": Matcher.kind, **model.plain()},
                                 "data rows": len(self.source), "precision": self.precision,
                                 "hidden words": bool(self.config.loss.mlm_weight)}
        if self.config.train.weight_ema:
            facts["weight_ema"] = True
        if self.config.optim.name != "adamw":
            facts["optim.name"] = self.config.optim.name
        return facts | self.order.facts()

    def _keep_text_source(self) -> None:
        """Save it in the run folder, so that a run which is continued need not make it again."""
        folder = self.run_state.run_dir / TEXT_FOLDER
        if not folder.exists():
            self.text_source.save_pretrained(folder)

    def _open_visits(self, model: MatcherConfig) -> None:
        config = self.config
        self.visits = CaptionedVisits(self.source, model.image.resolution, config.seed,
                                      config.data.horizontal_flip)
        captions = batch_captions(self.text_source, config.text, [self.source], self.group)
        # random words in place of hidden ones are drawn from all ids
        masked_vocab_size = self.text_source.vocab_size if config.loss.mlm_weight else None
        self.collate = CollateCaptioned(captions, config.seed, masked_vocab_size)

    def _build(self, model: MatcherConfig) -> None:
        seed_everything(self.config.seed, 0)  # the same weights on every process
        self.model = MatcherWithTextHead(Matcher(model), self.config.loss)
        recompute_activations(self.model, self.config.train.gradient_checkpointing)
        self.start_engine(self.model)
        seed_everything(self.config.seed, self.group.rank)  # dropout differs between the processes

    # ---- training

    def task(self) -> Task:
        """The run as the training loop sees it."""
        return Task("train matcher", [self.engine], self.batches, self.train, self.metrics,
                    self.sample, problem=self.problem, state=self.state, restore=self.restore,
                    order=self.order, key=self.source.key, validate=self.validate,
                    forward_flops=self._forward_flops())

    def _forward_flops(self) -> Callable[[], int] | None:
        """FLOPs of one image and its caption; None with hidden words, whose pass is not counted."""
        if self.config.loss.mlm_weight:
            return None
        config = self.model.matcher.config
        return lambda: matcher_forward_flops(config)

    def train(self, batch: CaptionedBatch, step: int) -> dict[str, Tensor]:
        """Learn from one micro-batch; a step at the end of a window -> terms to log."""
        self.drops.count(batch.dropped)
        outputs, hidden_words = self._forward(batch)
        same_caption = batch.same_caption.to(self.group.device)
        total, terms = matcher_loss(outputs, self.config.loss, same_caption, hidden_words)
        self.engine.backward(total, step + 1, terms)
        self.engine.step(step + 1)

        if self.engine.window_closed and self.model.matcher.clamp_scale():
            # else the optimizer's copy would undo it
            self.engine.take_over([self.model.matcher.logit_scale])
        self.update_average()
        return {"loss": total.detach(), **terms,
                "accuracy": batch_accuracy(outputs.embeddings, same_caption),
                "scale": outputs.scale.detach()}

    def _forward(self, batch: CaptionedBatch) -> tuple[MatcherOutputs, Tensor | None]:
        """Run the forward pass -> its outputs and the true ids [M] of the hidden words, if any."""
        device, dtype = self.group.device, DTYPES[self.precision]
        image = batch.image.to(device, dtype, memory_format=torch.channels_last)  # [B, 3, S, S]
        text, mask = (part.to(device) for part in batch.text)  # [B, T] each, or features [B, T, F]
        # features follow the weights' precision; ids stay int64 for the embedding
        inputs = [image, text.to(dtype) if text.is_floating_point() else text, mask]
        if batch.masked is None:
            return self.engine(*inputs), None

        hidden_ids, predicted = (part.to(device) for part in batch.masked)
        return self.engine(*inputs, hidden_ids, predicted), text[predicted]

    # ---- curves, measurements, export

    def full_model(self) -> Matcher:
        """Return a float32 copy on the CPU with the current weights, or their average."""
        state = self.current_weights()
        model = Matcher(self.model.matcher.config)
        model.load_state_dict(with_prefix(MATCHER, state))
        return model.eval()

    def sample(self, step: int) -> None:
        """Draw curves.png; a matcher has no images to sample."""
        if not self.group.is_first:
            return
        run_dir = self.run_state.run_dir
        rows = read_metrics(run_dir / "metrics.jsonl")
        losses = ["contrastive", "words"] if self.model.head else ["contrastive"]
        panels = [("loss", rows, losses), ("caption right, of its batch", rows, ["accuracy"]),
                  ("1 / temperature", rows, ["scale"])]
        plot_curves(panels, run_dir / "curves.png")

    def validate(self, step: int) -> Measured:
        """Measure the share of held-out images whose caption is found, after a step."""
        model = self.full_model()
        report = self.group.first_does(lambda: self.held_out_report(model, step))
        return Measured("validation_top1", report["top1"])

    def measure(self, model: Matcher, quiet: bool = True) -> dict[str, Any]:
        """Measure retrieval on the held-out split."""
        assert self.held_out is not None
        scorer = MatcherScorer(model.to(self.group.device), self.text_source)
        return {"split": self.config.data.validation_split,
                **evaluate_retrieval(scorer, self.held_out)}

    def finish(self) -> None:
        """Measure the held-out split and export run_dir/model."""
        model = self.full_model()
        self.drops.say()
        if not self.group.is_first:
            return
        self.sample(self.config.train.steps)  # the last curves, whatever train.sample_every is

        run_dir, report = self.run_state.run_dir, None
        if self.held_out is not None:
            report = self.held_out_report(model, self.config.train.steps)
            write_json_atomic(run_dir / "validation.json", report)
            log.info("held-out pictures: of %d captions the right one is first for %.1f %% "
                     "(chance %.1f %%), among the first five for %.1f %%", report["captions"],
                     100 * report["top1"], 100 * report["chance_top1"], 100 * report["top5"])

        card = matcher_card(self.config, model.config, len(self.source), report)
        folder = save_matcher_folder(run_dir / "model", model.cpu(), self.text_source, card)
        log.info("matcher: %s", folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Train from command-line arguments; errors become one line and an exit code."""
    return train_from_command_line(argv, MatcherRunConfig, MatcherTraining, "train_matcher.py",
                                   __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
