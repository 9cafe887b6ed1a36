"""`tokenloom train` itself: look, choose, then run the three scripts and report, phase by phase."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from tokenizer_image import load_tokenizer
from tokenloom_common.errors import UserError
from tokenloom_common.files import atomic_folder, write_json_atomic, write_text_atomic
from training.autotrain.clock import Clock
from training.autotrain.launching import launch
from training.autotrain.measure import Measured, measure_model
from training.autotrain.phases import PhaseRunner
from training.autotrain.places import (
    CURVES,
    FIGURES,
    OUT_NAMES,
    PLAN,
    REPORT,
    SAMPLES,
    TIME,
    training_folder,
)
from training.autotrain.plan import (
    Plan,
    TrainOptions,
    check_same_data,
    continued_plan,
    make_plan,
    plan_lines,
    say_plan,
)
from training.autotrain.prepare import HELD_OUT, open_copy, write_copy
from training.autotrain.recipes import read_stage, tokenizer_values, transformer_values
from training.autotrain.report import draw_curves, figure_rows, next_steps, page
from training.autotrain.stage import Stage, export_best, run_stage
from training.autotrain.words import notes_of
from training.data.sources.open_dataset import open_dataset
from training.runs.run_folder import hold_folder
from training.warm_start.code_tables import has_vector_per_code

log = logging.getLogger(__name__)

TOKENIZER_TOLERANCE = 0.12  # shares of the minutes: the transformer can make up for the tokenizer
TRANSFORMER_TOLERANCE = 0.07
ENDING = 0.4  # seconds to measure and export / seconds to start


class AutoTrain:
    """The phases of one training, each noted when it is done."""

    def __init__(self, options: TrainOptions, plan: Plan, clock: Clock) -> None:
        self.options, self.plan, self.clock = options, plan, clock
        self.choices = plan.choices
        self.out, self.folder = Path(options.out), training_folder(options.out)
        self.copy, self.tokens = self.folder / "data", self.folder / "tokens"
        self.tokenizer, self.transformer = (self.folder / "tokenizer",
                                            self.folder / "transformer")

    def run(self) -> None:
        """Run all phases that are not done."""
        plan = self.plan.plain(self.options)
        write_json_atomic(self.folder / PLAN, plan)
        phases = PhaseRunner(self.folder, json.dumps(plan, sort_keys=True))
        # a phase that reads only earlier results has no inputs of its own: the chain has theirs
        phases.phase("data", "", self.copy, self._copy)
        phases.phase("tokenizer", "", self.tokenizer / "model",
                     lambda: self._train_tokenizer(phases.continued_folder("tokenizer")))
        phases.phase("tokens", "", self.tokens, self._encode)
        phases.phase("transformer", "", self.transformer / "model",
                     lambda: self._train_transformer(phases.continued_folder("transformer")))
        phases.phase("report", "", self.out / REPORT, self._report)
        self._say()

    # ---- phases

    def _copy(self) -> None:
        self.clock.begin("data")
        options, data = self.options, self.plan.data
        source = open_dataset(options.data, split=options.split, **options.reading)
        held_out = None
        if data.held_out is not None:
            held_out = open_dataset(options.data, split=data.held_out, **options.reading)
        write_copy(source, held_out, self.choices, self.copy, options, self.clock.tick)
        self.clock.save()

    def _train_tokenizer(self, run_dir: Path) -> None:
        choices = self.choices
        times, start = choices.times, self.plan.start_seconds
        recipe = self._write_recipe("tokenizer", tokenizer_values(choices, self.plan.machine))
        # what comes after it keeps its time
        after = times.report + times.transformer + times.encode + (2 + ENDING) * start
        arguments = ["--config", recipe, "--data.path", self.copy, "--run_dir", run_dir,
                     "--seed", self.options.seed, *self._validation()]
        self._run("tokenizer", "train_tokenizer.py", run_dir, arguments,
                  self.clock.budget - after, times.picture_seconds, TOKENIZER_TOLERANCE)

    def _encode(self) -> None:
        self.clock.begin("tokens")

        def look() -> bool:
            self.clock.tick()
            return False

        launch("encode_dataset.py", "--image_tokenizer", self.tokenizer / "model", "--data.path",
               self.copy, "--out", self.tokens, look=look)
        self.clock.save()

    def _train_transformer(self, run_dir: Path) -> None:
        choices = self.choices
        code_tables = has_vector_per_code(load_tokenizer(self.tokenizer / "model"))
        keep_best = self._keeps_best()
        recipe = self._write_recipe("transformer",
                                    transformer_values(choices, code_tables, keep_best))
        # the best one takes another start
        ending = ENDING + 1 if keep_best else ENDING
        after = choices.times.report + ending * self.plan.start_seconds
        arguments = ["--config", recipe, "--data.path", self.tokens, "--image_tokenizer",
                     self.tokenizer / "model", "--seed", self.options.seed, *self._validation()]
        self._run("transformer", "train_seq2seq.py", run_dir, [*arguments, "--run_dir", run_dir],
                  self.clock.budget - after, choices.times.row_seconds, TRANSFORMER_TOLERANCE)
        if keep_best:
            export_best("train_seq2seq.py", run_dir,
                        [*arguments, *self.options.overrides.get("transformer", [])])

    def _keeps_best(self) -> bool:
        """Whether the best checkpoint is wanted, and the user's keys leave it to this command."""
        keys = self.options.overrides.get("transformer", [])[::2]
        own = any(key.startswith(("--checkpoint.", "--train.validate_every")) for key in keys)
        return self.choices.keeps_best and not own

    def _run(self, name: str, script: str, run_dir: Path, arguments: list[object], until: float,
             seconds_each: float, tolerance: float) -> None:
        """Run a training script. seconds_each: of an image or a row."""
        overrides = self.options.overrides.get(name, [])
        config = read_stage(name, [str(word) for word in arguments], {name: overrides})
        # of the merged config: the user may have set another batch, or the steps
        steps = config.train.steps if "--train.steps" in overrides else None
        stage = Stage(name, script, run_dir, [*arguments, *overrides], until,
                      self.plan.start_seconds, seconds_each * config.train.batch_size, tolerance,
                      steps)
        run_stage(stage, self.clock)

    def _validation(self) -> list[str]:
        has_held_out = bool(list((self.copy / "data").glob(f"{HELD_OUT}-*")))
        return ["--data.validation_split", HELD_OUT] if has_held_out else []

    def _write_recipe(self, name: str, values: dict[str, Any]) -> Path:
        path = self.folder / f"{name}.yaml"
        command = f"tokenloom train {shlex.quote(self.options.data)}"
        write_text_atomic(path, f"# chosen by `{command} --minutes {self.options.minutes:g}`\n"
                          + yaml.safe_dump(values, sort_keys=False))
        return path

    def _report(self) -> None:
        self.clock.begin("report")
        train, held_out = open_copy(self.copy, "train"), open_copy(self.copy, HELD_OUT)
        assert train is not None, "a copy without images is refused"
        model = self.transformer / "model"
        measured = measure_model(model, train, held_out, self.options.seed,
                                 max(0.0, self.clock.left))
        self.clock.save()
        figures = {**measured.figures, "seconds": self.clock.stages,
                   "minutes": self.clock.spent / 60}
        write_json_atomic(self.folder / FIGURES, figures)
        with atomic_folder(self.out, OUT_NAMES) as aside:
            for item in model.iterdir():
                if item.is_dir():
                    shutil.copytree(item, aside / item.name)
                else:
                    shutil.copy2(item, aside / item.name)
            measured.samples.save(aside / SAMPLES)
            draw_curves(self.tokenizer, self.transformer, aside / CURVES)
            write_text_atomic(aside / REPORT, self._page(measured, aside / CURVES))

    def _page(self, measured: Measured, curves: Path) -> str:
        configs = {f"Config of the {name}": (run / "config.yaml").read_text(encoding="utf-8")
                   for name, run in (("image tokenizer", self.tokenizer),
                                     ("transformer", self.transformer))}
        images: dict[str, Any] = {"Samples": measured.samples,
                                  "Reconstructions": measured.reconstructions, "Curves": curves}
        return page(self.out.name, plan_lines(self.plan, self.options),
                    notes_of(self.choices, self.plan.data), measured.figures,
                    dict(self.clock.stages), self._next(measured.figures), images, configs)

    def _next(self, figures: dict[str, Any]) -> list[str]:
        command = f"tokenloom train {shlex.quote(self.options.data)} --out another_model"
        caption = figures.get("example", "a caption")
        generate = (f"tokenloom generate {shlex.quote(caption)} --model "
                    f"{shlex.quote(str(self.out))} --num-images 4 --out pictures")
        return next_steps(figures, self.options.minutes, command, generate)

    def _say(self) -> None:
        figures = json.loads((self.folder / FIGURES).read_text(encoding="utf-8"))
        for name, value in figure_rows(figures):
            print(f"{name:<19} {value}")
        print(f"took {figures['minutes']:.1f} minutes of {self.options.minutes:g}")
        print(f"model: {self.out}   samples: {self.out / SAMPLES}   report: {self.out / REPORT}   "
              f"runs: {self.folder}")
        for step in self._next(figures):
            print(f"next: {step}")


def train(options: TrainOptions, dry_run: bool, started: float | None = None) -> None:
    """Train, or go on; with `dry_run` say the choices alone and write nothing."""
    started = time.monotonic() if started is None else started
    folder = training_folder(options.out)
    clock = Clock(folder / TIME, options.minutes * 60, started)
    plan = continued_plan(options)
    if plan is None:
        plan = make_plan(options, clock)
    else:
        source = open_dataset(options.data, split=options.split, **options.reading)
        check_same_data(len(source), plan, options)
        log.info("%s: goes on; %.1f of %g minutes are spent", folder, clock.spent / 60,
                 options.minutes)
    say_plan(plan, options)
    if dry_run:
        return
    try:
        hold_folder(folder)
    except UserError as error:  # it speaks of the scripts' option
        raise UserError(str(error).replace("--run_dir", "--out")) from None
    AutoTrain(options, plan, clock).run()
