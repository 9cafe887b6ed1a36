"""Train an image tokenizer on a folder of images.

CPU:  python training/train_tokenizer.py --config training/recipes/debug_tokenizer.yaml
      --data.path DIR --run_dir RUN
real: deepspeed training/train_tokenizer.py --config training/recipes/small_tokenizer.yaml
      --data.path DIR --run_dir RUN
"""

# Axes: B batch, S pixels of a side

from __future__ import annotations

import sys

from training.places import refuse_early

if __name__ == "__main__":
    refuse_early("train_tokenizer.py")  # before the imports below, which take seconds

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer_image import LPIPS, ImageTokenizer, build_tokenizer
from tokenizer_image.discriminators import build_discriminator
from tokenizer_image.images import float_to_pixels, image_grid, pixels_to_images
from tokenloom_common.files import write_json_atomic
from training.config.start_folders import facts_of_run
from training.config.tokenizer import TokenizerRunConfig
from training.data.run_data import image_order, open_training_images
from training.data.sources.captioned_images import CaptionedImages
from training.data.visits.images import ImageVisits, PixelBatch, collate_pixels
from training.data.visits.order import ItemId
from training.engine.launch import DTYPES
from training.engine.processes import Processes
from training.evaluation.plots import plot_curves
from training.evaluation.reconstruction import evaluate_reconstruction
from training.loop.drops import PictureDrops
from training.loop.loop import Task
from training.loop.script import train_from_command_line
from training.loop.trained import Training, add_prefix, open_held_out_pictures, with_prefix
from training.objectives.adversary import Adversary
from training.objectives.tokenizer import TokenizerObjective
from training.objectives.tokenizer_health import TokenizerHealth
from training.planning.fits import refuse_what_cannot_fit
from training.planning.flops import tokenizer_forward_flops
from training.planning.plan import tokenizer_plan
from training.runs.cards import tokenizer_card
from training.runs.metrics import read_metrics, sample_path
from training.runs.random_state import seed_everything
from training.runs.retention import Measured
from training.runs.run_state import RunState
from training.warm_start.tokenizer import take_tokenizer

log = logging.getLogger("training.train_tokenizer")  # under a launcher __name__ is "__main__"

SAMPLE_PICTURES = 8  # columns of a sample grid


class TokenizerTraining(Training):
    """One run: the model, its data and what the loop needs of them."""

    config: TokenizerRunConfig

    def __init__(self, config: TokenizerRunConfig, group: Processes) -> None:
        super().__init__(config, group)
        self.perceptual = group.first_then_others(self._load_perceptual)  # a missing file: now
        self._check()

        source = group.first_then_others(
            lambda: open_training_images(config.data, config.data.split))
        self.held_out: CaptionedImages | None = open_held_out_pictures(config.data, group)
        self.drops: PictureDrops = PictureDrops(config.data, source, group)
        self.visits = ImageVisits(source, config.model.resolution, config.seed,
                                  config.data.horizontal_flip)
        self.collate = collate_pixels
        self.order = image_order(config.data, source, config.seed)

        seed_everything(config.seed, 0)  # the same weights on every process
        self.tokenizer = self._warm_start()
        self.run_state = RunState(config, group, self._facts(len(source)))
        self.run_state.prepare()
        self._build()

    # ---- set-up

    def _load_perceptual(self) -> LPIPS | None:
        loss = self.config.loss
        if loss.perceptual_weight == 0:
            return None
        return LPIPS.load(loss.perceptual_network, loss.perceptual_path).to(self.group.device)

    def _check(self) -> None:
        """Refuse what is impossible, before anything is touched."""
        self.group.first_does(self.micro_batch_size)
        self.group.first_does(self._check_discriminator)
        self.group.first_does(
            lambda: refuse_what_cannot_fit(tokenizer_plan(self.config, self.precision), self.group))

    def _check_discriminator(self) -> None:
        """Refuse images that are too small for the discriminator's layers."""
        if self.config.adversarial.weight:
            with torch.device("meta"):  # no memory, no random numbers
                build_discriminator(self.config.adversarial.discriminator,
                                    self.config.model.resolution)

    def _warm_start(self) -> ImageTokenizer:
        """Return the tokenizer to train, fresh or from init_from, with its fixed parts frozen."""
        config, train = self.config, self.config.train
        tokenizer = build_tokenizer(config.model).train()
        decoder_only = train.trained_part == "decoder"
        init_from = config.init_from
        is_continued = facts_of_run(config.run_dir, config.checkpoint.resume) is not None
        if init_from and not is_continued:  # else the weights come from a checkpoint
            self.group.first_then_others(
                lambda: take_tokenizer(tokenizer, init_from, decoder_only, config.run_dir))
        if decoder_only:
            tokenizer.freeze_codes()
        tokenizer.gradient_checkpointing = train.gradient_checkpointing
        return tokenizer

    def _facts(self, rows: int) -> dict[str, Any]:
        """Return the facts that a checkpoint must share with the run that continues it.

        An adversarial phase can be turned off, not on: a checkpoint with a discriminator serves a
        run without one.
        """
        config = self.config
        facts: dict[str, Any] = {
            "model": config.model.plain(), "data rows": rows, "precision": self.precision,
            "trained_part": config.train.trained_part, "codebook.window": config.codebook.window}
        if config.adversarial.weight:
            facts["discriminator"] = config.adversarial.discriminator.plain()
        if config.train.weight_ema:
            facts["weight_ema"] = True
        if config.init_from:
            facts["init_from"] = config.init_from
        facts |= self.order.facts()
        if config.optim.name != "adamw":
            facts["optim.name"] = config.optim.name
        if config.discriminator_optim.name != "adamw":
            facts["discriminator_optim.name"] = config.discriminator_optim.name
        return facts

    def _build(self) -> None:
        config, group = self.config, self.group
        self.start_engine(self.tokenizer)
        self.adversary = Adversary(config, group) if config.adversarial.weight else None
        self.objective = TokenizerObjective(config.loss, self.perceptual,
                                            self.adversary.terms if self.adversary else None)
        seed_everything(config.seed, group.rank)  # dropout and noise differ between the processes
        self.health = TokenizerHealth(config, group, len(self.visits))

    # ---- training

    def task(self) -> Task:
        """The run as the training loop sees it."""
        engines = [self.engine]
        if self.adversary:
            engines.append(self.adversary.engine)
        return Task("train tokenizer", engines, self.batches, self.train, self.metrics, self.sample,
                    problem=self.problem, state=self.state, restore=self.restore, order=self.order,
                    key=self.visits.source.key, validate=self.validate,
                    forward_flops=self._forward_flops())

    def _forward_flops(self) -> Callable[[], int] | None:
        """FLOPs of one image; None with other networks or frozen parts, which have no count."""
        config = self.config
        # the discriminator and LPIPS, whose FLOPs nobody counts here
        has_other_networks = config.adversarial.weight or config.loss.perceptual_weight
        if has_other_networks or config.train.trained_part != "all":
            return None
        return lambda: tokenizer_forward_flops(config.model)

    def train(self, batch: PixelBatch, step: int) -> dict[str, Tensor]:
        """Learn from one micro-batch; both networks step at the end of a window -> terms to log."""
        self.drops.count(batch.dropped)
        # every convolution then runs channels-last, while weights stay as ZeRO can flatten them
        image = batch.image.to(self.group.device, memory_format=torch.channels_last)  # [B, 3, S, S]

        schedules = self.tokenizer.set_step(step, self.config.train.steps)
        # not through the engine, whose forward allows no gradient inside a step
        result = self.tokenizer(image.to(DTYPES[self.precision]))
        # codes that an average or a restart rewrote, or the optimizer's copies would undo it
        self.engine.take_over(self.tokenizer.take_rewritten())

        total, terms = self.objective(result, image, self.tokenizer.last_layer, step)
        # so that a message about a term that is not finite names it once
        unweighted = {name: term for name, term in terms.items()
                      if not name.startswith("weighted.")}
        self.engine.backward(total, step + 1, unweighted)
        self.engine.step(step + 1)
        if self.adversary:
            terms |= self.adversary.train(image, result.reconstruction, step)
        self.update_average()
        self.health.update(image, result, self.tokenizer.take_restarts(), step)

        # as tensors, like all terms that the log averages
        scheduled = {name: torch.tensor(value) for name, value in schedules.items()}
        return {"loss": total.detach(), **terms, **scheduled}

    def metrics(self) -> dict[str, float]:
        """Return the health of codebook and reconstructions, and unusable images."""
        return self.health.report() | super().metrics()

    def parts(self) -> dict[str, nn.Module]:
        """Modules without an engine whose state belongs to a checkpoint, by name."""
        lecam = {} if self.adversary is None else {"lecam": self.adversary.lecam}
        return super().parts() | lecam

    def state(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint beside the engines'."""
        return add_prefix("health.", self.health.state()) | super().state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from the tensors that `state` gave."""
        self.health.restore(with_prefix("health.", state))
        super().restore(state)

    # ---- samples, measurements, export

    def full_model(self) -> ImageTokenizer:
        """Return a float32 copy on the CPU with the current weights, or their average."""
        state = self.current_weights()
        model = build_tokenizer(self.config.model)
        model.load_state_dict(state)
        return model.eval()

    def sample(self, step: int) -> None:
        """Write originals above their reconstructions, curves.png and codebook.png."""
        model = self.full_model()
        counts = self.health.codebook.counts()  # before the return: it sums over all processes
        if not self.group.is_first:
            return
        self._draw_curves(counts)

        count = min(SAMPLE_PICTURES, len(self.visits))
        # spread over the data, and the same images in every grid
        indices = [number * len(self.visits) // count for number in range(count)]
        image = collate_pixels([self.visits[ItemId(0, index)] for index in indices]).image
        rows = torch.cat([image, model.decode(model.encode(image))])
        grid = image_grid(pixels_to_images(float_to_pixels(rows)), columns=count)
        grid.save(sample_path(self.run_state.run_dir, step))

    def _draw_curves(self, counts: Tensor) -> None:
        run_dir = self.run_state.run_dir
        rows = read_metrics(run_dir / "metrics.jsonl")
        weighted = sorted({name for row in rows for name in row if name.startswith("weighted.")})
        panels = [("loss", rows, ["loss"]), ("terms, weighted", rows, weighted),
                  ("gradient norm", rows, ["grad_norm"])]
        if self.adversary:
            panels.append(("logits of the discriminator", rows, ["logits_real", "logits_fake"]))
        plot_curves(panels, run_dir / "curves.png", small_too=True)
        self.health.codebook.draw(counts, run_dir / "metrics.jsonl", run_dir / "codebook.png")

    def validate(self, step: int) -> Measured:
        """Measure the PSNR of the held-out images after a step."""
        model = self.full_model()
        report = self.group.first_does(lambda: self.held_out_report(model, step, quiet=True))
        return Measured("validation_psnr", report["psnr"])

    def measure(self, model: ImageTokenizer, quiet: bool) -> dict[str, Any]:
        """Measure reconstructions of the held-out split."""
        assert self.held_out is not None
        return evaluate_reconstruction(model.to(self.group.device), self.held_out, quiet=quiet)

    def finish(self) -> None:
        """Measure the held-out split and export run_dir/model."""
        model = self.full_model()
        counts = self.health.codebook.counts()
        self.drops.say()
        if not self.group.is_first:
            return
        self._draw_curves(counts)

        run_dir, report = self.run_state.run_dir, None
        if self.held_out is not None:
            report = self.held_out_report(model, self.config.train.steps)
            write_json_atomic(run_dir / "validation.json", report)
            log.info("held-out pictures: %.2f dB PSNR, %.1f %% of codes used", report["psnr"],
                     100 * report["codebook_usage"])

        card = tokenizer_card(self.config, model, len(self.visits), report)
        log.info("image tokenizer: %s", model.save_pretrained(run_dir / "model", card=card))
        self.health.reconstruction.check_export(model, self.visits)


def main(argv: Sequence[str] | None = None) -> int:
    """Train from command-line arguments; errors become one line and an exit code."""
    return train_from_command_line(argv, TokenizerRunConfig, TokenizerTraining,
                                   "train_tokenizer.py", __doc__ or "")


if __name__ == "__main__":
    sys.exit(main())
