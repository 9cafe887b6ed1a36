"""Train an image tokenizer on a folder of pictures.

CPU:  python training/train_tokenizer.py --config training/recipes/debug_tokenizer.yaml --data.path DIR --run_dir RUN
real: deepspeed training/train_tokenizer.py --config training/recipes/small_tokenizer.yaml --data.path DIR --run_dir RUN
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from tokenizer_image import LPIPS, ImageTokenizer, build_tokenizer, tokenizer_loss
from tokenizer_image.discriminators import build_discriminator
from tokenizer_image.images import float_to_pixels, image_grid, pixels_to_images
from tokenloom_common.errors import run_command
from tokenloom_common.files import write_json_atomic
from training.config.start_folders import facts_of_run
from training.config.tokenizer import TokenizerRunConfig
from training.data.run_data import open_training_pictures, picture_order
from training.data.sources.captioned_images import CaptionedImages
from training.data.visits.images import ImageVisits, PixelBatch, collate_pixels
from training.data.visits.loader import batch_loader
from training.data.visits.order import ItemId, MicroBatches
from training.engine.deepspeed_engine import Engine
from training.engine.deepspeed_json import deepspeed_json
from training.engine.launch import DTYPES, resolve_precision
from training.engine.optim import build_optimizer
from training.engine.processes import Processes
from training.engine.weight_average import weight_average
from training.evaluation.plots import plot_curves
from training.evaluation.reconstruction import evaluate_reconstruction
from training.loop.drops import PictureDrops
from training.loop.loop import Task
from training.loop.script import train_from_command_line
from training.objectives.adversary import Adversary
from training.objectives.codebook_health import CodebookHealth
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

SAMPLE_PICTURES = 8


class TokenizerTraining:
    """One run: the model, its data and what the loop needs of them."""

    def __init__(self, config: TokenizerRunConfig, group: Processes) -> None:
        self.config, self.group = config, group
        self.perceptual = group.first_then_others(self._perceptual)
        precision = resolve_precision(config, group.device)
        # a batch that cannot be divided, a picture too small for the discriminator: refused now, before anything is touched
        group.first_does(lambda: deepspeed_json(config, group.world_size, precision, parameters=1) and None)
        group.first_does(self._check_discriminator)
        group.first_does(lambda: refuse_what_cannot_fit(tokenizer_plan(config, precision), group))
        source = group.first_then_others(lambda: self._open(config.data.split))
        self.held_out: CaptionedImages | None = None  # on the first process, which measures
        if config.data.validation_split:
            group.first_does(self._open_held_out)  # exists, before hours of training
        self.drops = PictureDrops(config.data, source, group)
        self.visits = ImageVisits(source, config.model.resolution, config.seed, config.data.horizontal_flip)
        self.order = picture_order(config.data, source, config.seed)
        seed_everything(config.seed, 0)  # the same weights on every process
        self.tokenizer = self._build()
        self.run_state = RunState(config, group, self._facts(precision, len(source)))
        self.run_state.prepare()
        self.average = self._weight_average()
        self.engine = Engine(self.tokenizer, build_optimizer(self.tokenizer, config.optim), config, group, precision)
        self.adversary = Adversary(config, group) if config.adversarial.weight else None
        seed_everything(config.seed, group.rank)
        self._measured_at: dict[int, dict[str, Any]] = {}  # step -> what the held-out split said
        self.dtype = DTYPES[precision]
        self.health = CodebookHealth(config, group, len(source))

    def _open(self, split: str | None) -> CaptionedImages:
        return open_training_pictures(self.config.data, split)

    def _open_held_out(self) -> None:
        self.held_out = self._open(self.config.data.validation_split)
        len(self.held_out)

    def _perceptual(self) -> LPIPS | None:
        if self.config.loss.perceptual_weight == 0:
            return None
        return LPIPS.load(self.config.loss.perceptual_network, self.config.loss.perceptual_path).to(self.group.device)

    def _facts(self, precision: str, rows: int) -> dict[str, Any]:
        """What a checkpoint must share with the run that continues it. An adversarial phase can be turned off, not on."""
        train, adversarial = self.config.train, self.config.adversarial
        facts = {"model": self.config.model.plain(), "data rows": rows, "precision": precision,
                 "trained_part": train.trained_part, "codebook.window": self.config.codebook.window}
        if adversarial.weight:
            facts["discriminator"] = adversarial.discriminator.plain()
        if train.weight_ema:
            facts["weight_ema"] = True
        then = facts_of_run(self.config.run_dir, self.config.checkpoint.resume)
        if self.config.init_from and (then is None or "init_from" in then):  # runs from before init_from did not keep it
            facts["init_from"] = self.config.init_from
        facts |= self.order.facts()
        names = {"optim.name": self.config.optim.name, "discriminator_optim.name": self.config.discriminator_optim.name}
        facts |= {key: name for key, name in names.items() if name != "adamw"}
        return facts

    def _check_discriminator(self) -> None:
        if self.config.adversarial.weight:
            with torch.device("meta"):
                build_discriminator(self.config.adversarial.discriminator, self.config.model.resolution)

    def _build(self) -> ImageTokenizer:
        """The tokenizer to train, fresh or from init_from, with what does not learn frozen."""
        config, train = self.config, self.config.train
        tokenizer = build_tokenizer(config.model).train()
        folder, decoder_only = config.init_from, train.trained_part == "decoder"
        if folder and facts_of_run(config.run_dir, config.checkpoint.resume) is None:  # else a checkpoint follows
            self.group.first_then_others(lambda: take_tokenizer(tokenizer, folder, decoder_only, config.run_dir))
        if train.trained_part == "decoder":
            tokenizer.freeze_codes()
        tokenizer.gradient_checkpointing = train.gradient_checkpointing
        return tokenizer

    def _weight_average(self) -> AveragedModel | None:
        """A float32 copy that follows the weights slowly, on the first process, which samples and exports."""
        if not self.config.train.weight_ema or not self.group.is_first:
            return None
        return weight_average(self.tokenizer, self.config.train.weight_ema, self.group.device)

    def task(self) -> Task:
        """This run as the training loop sees it."""
        engines = [self.engine, *([self.adversary.engine] if self.adversary else [])]
        return Task("train tokenizer", engines, self.batches, self.train, self.metrics, self.sample,
                    problem=lambda: self.drops.problem, state=self._state, restore=self._restore, order=self.order,
                    key=self.visits.source.key, validate=self.validate, forward_flops=self._forward_flops())

    def _forward_flops(self) -> Callable[[], int] | None:
        """Of one picture, where the tokenizer is all that a step computes: other networks and frozen parts are not counted."""
        config = self.config
        alone = not (config.adversarial.weight or config.loss.perceptual_weight) and config.train.trained_part == "all"
        return (lambda: tokenizer_forward_flops(config.model)) if alone else None

    def _kept(self) -> dict[str, torch.nn.Module]:
        """Modules beside the engines' whose state belongs to a checkpoint."""
        parts: dict[str, torch.nn.Module | None] = {
            "average": self.average, "lecam": self.adversary.lecam if self.adversary else None}
        return {name: part for name, part in parts.items() if part is not None}

    def _state(self) -> dict[str, Tensor]:
        state = {f"health.{name}": tensor for name, tensor in self.health.state().items()}
        for part, module in self._kept().items():
            state |= {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()}
        return state

    def _restore(self, state: dict[str, Tensor]) -> None:
        def of(part: str) -> dict[str, Tensor]:
            return {name.removeprefix(f"{part}."): tensor for name, tensor in state.items() if name.startswith(f"{part}.")}

        self.health.restore(of("health"))
        for part, module in self._kept().items():
            module.load_state_dict(of(part))

    def batches(self, first_step: int) -> Iterable[PixelBatch]:
        """This process's micro-batches from `first_step` on."""
        train = self.config.train
        order = MicroBatches(self.order, train.batch_size, train.accumulation, self.group.rank, self.group.world_size,
                             first_step, train.steps)
        return batch_loader(self.visits, order, self.config.data.workers, collate_pixels)

    def train(self, batch: PixelBatch, step: int) -> dict[str, Tensor]:
        """One micro-batch: gradients and, at the end of a window, optimizer steps of both networks -> terms to log."""
        self.drops.count(batch.dropped)
        # channels-last pictures make every convolution run so; the weights stay as ZeRO can flatten them
        image = batch.image.to(self.group.device, memory_format=torch.channels_last)
        schedules = self.tokenizer.set_step(step, self.config.train.steps)
        result = self.tokenizer(image.to(self.dtype))  # not through the engine, which allows no gradient inside a step
        self.engine.take_over(self.tokenizer.take_rewritten())
        self.health.update(result.codes, self.tokenizer.take_restarts())
        loss = tokenizer_loss(result, image, self.config.loss, self.perceptual)
        total = loss.total
        terms = {**loss.terms, **{f"weighted.{name}": term for name, term in loss.weighted.items()}}
        if self.adversary:
            term, more = self.adversary.generator_term(result.reconstruction, total, self.tokenizer.last_layer, step)
            total, terms = total + term, terms | more
        self.engine.backward(total, step + 1, {name: term for name, term in terms.items() if not name.startswith("weighted.")})
        self.engine.step(step + 1)
        if self.adversary:
            terms |= self.adversary.train(image, result.reconstruction, step)
        if self.average is not None and self.engine.window_applied:
            self.average.update_parameters(self.tokenizer)
        return {"loss": total.detach(), **terms, **{name: torch.tensor(value) for name, value in schedules.items()}}

    def metrics(self) -> dict[str, float]:
        """Windowed codebook usage and perplexity, and items skipped, over all processes."""
        return {**self.health.report(), "dropped_items": self.drops.total()}

    def full_model(self) -> ImageTokenizer:
        """A float32 copy on the CPU with the whole current weights, or their average. All processes must call it."""
        state = self.engine.full_state()
        if self.average is not None and int(self.average.n_averaged):
            state = self.average.module.state_dict()
        model = build_tokenizer(self.config.model)
        model.load_state_dict(state)
        return model.eval()

    def sample(self, step: int) -> None:
        """samples/step-…png: originals above their reconstructions; curves.png and codebook.png."""
        model = self.full_model()
        counts = self.health.counts()
        if not self.group.is_first:
            return
        self._draw(counts)
        count = min(SAMPLE_PICTURES, len(self.visits))
        spread = [number * len(self.visits) // count for number in range(count)]
        image = collate_pixels([self.visits[ItemId(0, index)] for index in spread]).image
        rows = torch.cat([image, model.decode(model.encode(image))])
        grid = image_grid(pixels_to_images(float_to_pixels(rows)), columns=count)
        grid.save(sample_path(self.run_state.run_dir, step))

    def _draw(self, counts: Tensor) -> None:
        run_dir = self.run_state.run_dir
        rows = read_metrics(run_dir / "metrics.jsonl")
        weighted = sorted({name for row in rows for name in row if name.startswith("weighted.")})
        panels = [("loss", rows, ["loss"]), ("terms, weighted", rows, weighted), ("gradient norm", rows, ["grad_norm"])]
        if self.adversary:
            panels.append(("logits of the discriminator", rows, ["logits_real", "logits_fake"]))
        plot_curves(panels, run_dir / "curves.png", small_too=True)
        self.health.draw(counts, run_dir / "metrics.jsonl", run_dir / "codebook.png")

    def validate(self, step: int) -> Measured:
        """PSNR of the held-out pictures after a step. All processes must call it."""
        model = self.full_model()
        report = self.group.first_does(lambda: self._measure(model, quiet=True))
        self._measured_at = {step: report}
        return Measured("validation_psnr", report["psnr"])

    def _measure(self, model: ImageTokenizer, quiet: bool = False) -> dict[str, Any]:
        assert self.held_out is not None
        return evaluate_reconstruction(model.to(self.group.device), self.held_out, quiet=quiet)

    def finish(self) -> None:
        """Measure the held-out split and export run_dir/model."""
        model = self.full_model()
        counts = self.health.counts()
        self.drops.say()
        if not self.group.is_first:
            return
        self._draw(counts)
        report = None
        if self.held_out is not None:
            report = self._measured_at.get(self.config.train.steps) or self._measure(model)
            write_json_atomic(self.run_state.run_dir / "validation.json", report)
            log.info("held-out pictures: %.2f dB PSNR, %.1f %% of codes used", report["psnr"], 100 * report["codebook_usage"])
        card = tokenizer_card(self.config, model, len(self.visits), report)
        log.info("image tokenizer: %s", model.save_pretrained(self.run_state.run_dir / "model", card=card))


def run(argv: Sequence[str] | None) -> int:
    """Train from command-line arguments."""
    return train_from_command_line(argv, TokenizerRunConfig, TokenizerTraining, "train_tokenizer.py", __doc__ or "")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: errors become one line and an exit code."""
    return run_command(run, argv, "train_tokenizer.py")


if __name__ == "__main__":
    sys.exit(main())
