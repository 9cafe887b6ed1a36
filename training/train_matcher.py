"""Train a matcher, a small contrastive image-text model, on captioned pictures; its text tower can start a transformer's.

CPU:  python training/train_matcher.py --config training/recipes/debug_matcher.yaml --data.path DIR --run_dir RUN
real: deepspeed training/train_matcher.py --config training/recipes/emoji_matcher.yaml --data.path DIR --run_dir RUN

A caption is told from the others of its own process's micro-batch: train.batch_size / (processes x train.accumulation) of them.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference.scoring.matcher import Matcher, MatcherConfig
from inference.scoring.matcher_folder import MatcherScorer, save_matcher_folder
from seq2seq import FrozenTextEncoder, TextSource, TextTokenizer
from seq2seq.layers import recompute_activations
from seq2seq.losses import masked_text_loss
from tokenloom_common.errors import UserError, run_command
from tokenloom_common.files import write_json_atomic
from training.config.matcher import MatcherRunConfig
from training.config.start_folders import TEXT_FOLDER
from training.data.run_data import open_training_pictures, picture_order
from training.data.sources.captioned_images import CaptionedImages
from training.data.text_input import cached, choose_text_source
from training.data.visits.captioned import CaptionedBatch, CaptionedVisits, CollateCaptioned
from training.data.visits.loader import batch_loader
from training.data.visits.order import MicroBatches
from training.data.visits.tokens import Captions
from training.engine.deepspeed_engine import Engine
from training.engine.deepspeed_json import deepspeed_json
from training.engine.launch import DTYPES, resolve_precision
from training.engine.optim import build_optimizer
from training.engine.processes import Processes
from training.engine.weight_average import average_state, restore_average, weight_average
from training.evaluation.plots import plot_curves
from training.evaluation.retrieval import evaluate_retrieval
from training.loop.drops import PictureDrops
from training.loop.loop import Task
from training.loop.script import train_from_command_line
from training.objectives.matcher import MatcherObjective, batch_accuracy, contrastive_loss
from training.planning.fits import refuse_what_cannot_fit
from training.planning.flops import matcher_forward_flops
from training.planning.plan import matcher_plan
from training.runs.cards import matcher_card
from training.runs.metrics import read_metrics
from training.runs.random_state import seed_everything
from training.runs.retention import Measured
from training.runs.run_state import RunState

log = logging.getLogger("training.train_matcher")  # under a launcher __name__ is "__main__"

MATCHER = "matcher."  # the matcher's part of the objective's parameters


class MatcherTraining:
    """One run: the matcher, its text input, its data and what the loop needs of them."""

    def __init__(self, config: MatcherRunConfig, group: Processes) -> None:
        self.config, self.group = config, group
        precision = resolve_precision(config, group.device)
        group.first_does(lambda: self._check_batch(precision))
        self.source = group.first_then_others(lambda: self._open(config.data.split))
        self.held_out: CaptionedImages | None = None  # on the first process, which measures
        if config.data.validation_split:
            group.first_does(self._open_held_out)  # exists, before hours of training
        self.drops = PictureDrops(config.data, self.source, group)
        self.order = picture_order(config.data, self.source, config.seed)
        together = group.first_then_others if config.text.kind == FrozenTextEncoder.kind else group.first_does
        self.text_source: TextSource = together(self._text_source)
        model_config = config.model.build({
            "text_vocab_size": self.text_source.vocab_size, "text_feature_width": self.text_source.feature_width,
            "text_length": self.text_source.config.text_length})
        group.first_does(lambda: refuse_what_cannot_fit(matcher_plan(config, precision, model_config), group))
        self.run_state = RunState(config, group, self._facts(model_config, precision))
        self.run_state.prepare()
        group.first_does(self._keep_text_source)
        self.visits = CaptionedVisits(self.source, model_config.image.resolution, config.seed, config.data.horizontal_flip)
        self.collate = CollateCaptioned(self._captions(), config.seed,
                                        self.text_source.vocab_size if config.loss.mlm_weight else None)
        seed_everything(config.seed, 0)  # the same weights on every process
        self.objective = MatcherObjective(Matcher(model_config), config.loss)
        recompute_activations(self.objective, config.train.gradient_checkpointing)
        self.average = (weight_average(self.objective, config.train.weight_ema, group.device)
                        if config.train.weight_ema and group.is_first else None)
        self.engine = Engine(self.objective, build_optimizer(self.objective, config.optim), config, group, precision)
        seed_everything(config.seed, group.rank)
        self._measured_at: dict[int, dict[str, Any]] = {}  # step -> what the held-out split said
        self.dtype = DTYPES[precision]

    def _check_batch(self, precision: str) -> None:
        """A batch that cannot be divided, or leaves nothing to tell a caption from: refused before anything is touched."""
        micro = deepspeed_json(self.config, self.group.world_size, precision, parameters=1)["train_micro_batch_size_per_gpu"]
        if micro < 2:
            raise UserError(f"train.batch_size {self.config.train.batch_size} leaves a process one picture at a time, and a "
                            "caption is told from those of other pictures; raise it, or lower train.accumulation")

    def _open(self, split: str | None) -> CaptionedImages:
        return open_training_pictures(self.config.data, split)

    def _open_held_out(self) -> None:
        self.held_out = self._open(self.config.data.validation_split)
        len(self.held_out)

    def _text_source(self) -> TextSource:
        run = Path(self.config.run_dir)
        continued = self.config.checkpoint.resume != "never" and (run / "latest.json").is_file()
        found = choose_text_source(self.config.text, self.source, run / TEXT_FOLDER if continued else None)
        if self.config.loss.mlm_weight and found.kind != TextTokenizer.kind:
            raise UserError(f"loss.mlm_weight hides ids of a SentencePiece tokenizer, and text.tokenizer "
                            f"{self.config.text.tokenizer} is of kind {found.kind}; set it to 0, or leave text.tokenizer out")
        return found

    def _keep_text_source(self) -> None:
        folder = self.run_state.run_dir / TEXT_FOLDER
        if not folder.exists():
            self.text_source.save_pretrained(folder)

    def _captions(self) -> Captions:
        """What gives the batches their text: the source itself, or its features from disk."""
        cache = self.config.text.feature_cache
        if not isinstance(self.text_source, FrozenTextEncoder) or cache is None:
            return self.text_source
        source, wanted = self.text_source, self.source.all_captions()
        self.group.first_does(lambda: cached(source, Path(cache), wanted, may_write=True) and None)
        return cached(source, Path(cache), wanted, may_write=False)

    def _facts(self, model: MatcherConfig, precision: str) -> dict[str, Any]:
        """What a checkpoint must share with the run that continues it."""
        facts: dict[str, Any] = {"model": {"kind": Matcher.kind, **model.plain()}, "data rows": len(self.source),
                                 "precision": precision, "hidden words": bool(self.config.loss.mlm_weight)}
        if self.config.train.weight_ema:
            facts["weight_ema"] = True
        return facts | self.order.facts()

    def task(self) -> Task:
        """This run as the training loop sees it."""
        return Task("train matcher", [self.engine], self.batches, self.train, self.metrics, self.sample,
                    problem=lambda: self.drops.problem, state=lambda: average_state(self.average),
                    restore=lambda state: restore_average(self.average, state), order=self.order, key=self.source.key,
                    validate=self.validate, forward_flops=self._forward_flops())

    def _forward_flops(self) -> Callable[[], int] | None:
        """Of one picture and its caption; hidden words are predicted beside it, and not counted."""
        config = self.objective.matcher.config
        return None if self.config.loss.mlm_weight else lambda: matcher_forward_flops(config)

    def batches(self, first_step: int) -> Iterable[CaptionedBatch]:
        """This process's micro-batches from `first_step` on."""
        train = self.config.train
        order = MicroBatches(self.order, train.batch_size, train.accumulation, self.group.rank, self.group.world_size,
                             first_step, train.steps)
        return batch_loader(self.visits, order, self.config.data.workers, self.collate)

    def train(self, batch: CaptionedBatch, step: int) -> dict[str, Tensor]:
        """One micro-batch: gradients, and an optimizer step at the end of a window -> the loss, its parts, and how it goes."""
        self.drops.count(batch.dropped)
        device, loss = self.group.device, self.config.loss
        text, mask = (part.to(device) for part in batch.text)
        masked = [] if batch.masked is None else [part.to(device) for part in batch.masked]
        image = batch.image.to(device, self.dtype, memory_format=torch.channels_last)
        outputs = self.engine(image, text.to(self.dtype) if text.is_floating_point() else text, mask, *masked)
        same = batch.same_caption.to(device)
        terms = {"contrastive": contrastive_loss(outputs.embeddings, outputs.scale, same)}
        total = loss.contrastive_weight * terms["contrastive"]
        if outputs.text_logits is not None:
            terms["words"] = masked_text_loss(outputs.text_logits, text[masked[1]])
            total = total + loss.mlm_weight * terms["words"]
        self.engine.backward(total, step + 1, terms)
        self.engine.step(step + 1)
        if self.engine.window_closed and self.objective.matcher.clamp_scale():
            self.engine.take_over([self.objective.matcher.logit_scale])
        if self.average is not None and self.engine.window_applied:
            self.average.update_parameters(self.objective)
        return {"loss": total.detach(), **{name: term.detach() for name, term in terms.items()},
                "accuracy": batch_accuracy(outputs.embeddings, same), "scale": outputs.scale.detach()}

    def metrics(self) -> dict[str, float]:
        """Items skipped, over all processes."""
        return {"dropped_items": self.drops.total()}

    def full_model(self) -> Matcher:
        """A float32 copy on the CPU with the whole current weights, or their average. All processes must call it."""
        state = self.engine.full_state()
        if self.average is not None and int(self.average.n_averaged):
            state = self.average.module.state_dict()
        model = Matcher(self.objective.matcher.config)
        own = {name.removeprefix(MATCHER): tensor for name, tensor in state.items() if name.startswith(MATCHER)}
        model.load_state_dict(own)
        return model.eval()

    def sample(self, step: int) -> None:
        """curves.png: there are no pictures to sample."""
        if not self.group.is_first:
            return
        run_dir = self.run_state.run_dir
        rows = read_metrics(run_dir / "metrics.jsonl")
        plot_curves([("loss", rows, ["contrastive", "words"] if self.objective.head else ["contrastive"]),
                     ("caption right, of its batch", rows, ["accuracy"]), ("1 / temperature", rows, ["scale"])],
                    run_dir / "curves.png")

    def validate(self, step: int) -> Measured:
        """Share of held-out pictures whose caption is found, after a step. All processes must call it."""
        model = self.full_model()
        report = self.group.first_does(lambda: self._measure(model))
        self._measured_at = {step: report}
        return Measured("validation_top1", report["top1"])

    def _measure(self, model: Matcher) -> dict[str, Any]:
        assert self.held_out is not None
        scorer = MatcherScorer(model.to(self.group.device), self.text_source)
        return {"split": self.config.data.validation_split, **evaluate_retrieval(scorer, self.held_out)}

    def finish(self) -> None:
        """Measure the held-out split and export run_dir/model."""
        model = self.full_model()
        self.drops.say()
        if not self.group.is_first:
            return
        self.sample(self.config.train.steps)
        report = None
        if self.held_out is not None:
            report = self._measured_at.get(self.config.train.steps) or self._measure(model)
            write_json_atomic(self.run_state.run_dir / "validation.json", report)
            log.info("held-out pictures: of %d captions the right one is first for %.1f %% (chance %.1f %%), among the first "
                     "five for %.1f %%", report["captions"], 100 * report["top1"], 100 * report["chance_top1"],
                     100 * report["top5"])
        folder = save_matcher_folder(self.run_state.run_dir / "model", model.cpu(), self.text_source,
                                     matcher_card(self.config, model.config, len(self.source), report))
        log.info("matcher: %s", folder)


def run(argv: Sequence[str] | None) -> int:
    """Train from command-line arguments."""
    return train_from_command_line(argv, MatcherRunConfig, MatcherTraining, "train_matcher.py", __doc__ or "")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: errors become one line and an exit code."""
    return run_command(run, argv, "train_matcher.py")


if __name__ == "__main__":
    sys.exit(main())
