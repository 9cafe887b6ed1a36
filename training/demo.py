"""The whole way in one command: pictures at once, then a model of one's own and a report.

    python -m training.demo --out demo                # `make demo`; 15 minutes on 2 CPU cores
    python -m training.demo --out demo --size quick   # two minutes, with poor pictures

Draws first.png with the model that ships, builds a set of captioned emoji in OUT/data, and calls
`tokenloom train` on it, which leaves OUT/model. Then it measures what that command cannot know:
concepts that the training showed in one style only, and concepts that it did not show
(samples.png, report.json). The model that it starts from has seen most of them. A second run
reuses what is done.
"""

from __future__ import annotations

import sys

from training.places import check_demo_folder, refuse_early

if __name__ == "__main__":
    refuse_early("demo")  # before the imports below, which take seconds

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inference import TextToImage
from tokenloom_common.errors import OneLineParser, choose, run_command
from tokenloom_common.files import write_json_atomic
from training.autotrain.job import train
from training.autotrain.phases import PhaseRunner
from training.autotrain.plan import TrainOptions, continued_plan, shipped_start
from training.commands.train import seed_number
from training.data.builders.emoji import build_emoji
from training.data.sources.open_dataset import list_splits, open_dataset
from training.evaluation.caption_accuracy import (
    TrainingPictures,
    choose_questions,
    sample_questions,
)
from training.evaluation.reconstruction import evaluate_reconstruction
from training.evaluation.sheets import labelled_grid
from training.loop.log import setup_console
from training.runs.environment import environment

log = logging.getLogger("training.demo")

PIXELS = 64
QUESTIONS = 100  # captions per split that are sampled and measured
SHOWN = 24  # of these, in samples.png
FIRST_CAPTIONS = ("octopus", "red heart", "rocket, noto style", "smiling face with sunglasses",
                  "a tiger face emoji", "pizza, fluent 3d style", "green apple", "snowman")

# the emoji sets: two from npm, or the one that a pip package brings
STYLES, PIP_STYLES = ("noto", "fluent-3d"), ("twemoji",)
SPLITS = {
    "train": "captions of the training",
    "unseen_style": "concepts that the training showed in the other style only",
    "unseen_concept": "concepts that the training did not show"}
"""Split -> its heading in samples.png."""


@dataclass(frozen=True)
class DemoSize:
    """Concepts of the data set, minutes of the training, and keys over its choices."""

    concepts: int
    minutes: float
    overrides: dict[str, list[str]] = field(default_factory=dict)


FEW_STEPS = {"tokenizer": ["--train.steps", "30"], "transformer": ["--train.steps", "30"]}
SIZES = {"full": DemoSize(240, 15.0), "quick": DemoSize(40, 1.0, FEW_STEPS)}


class Demo(PhaseRunner):
    """The phases of the demo; `tokenloom train` is one of them and has phases of its own."""

    def __init__(self, out: Path, size: str, seed: int) -> None:
        super().__init__(out, f"{size}/{seed}")
        self.size, self.seed = choose(SIZES, size, "--size"), seed
        self.data, self.model = out / "data", out / "model"
        self.options = TrainOptions(
            data=str(self.data), out=str(self.model), minutes=self.size.minutes, seed=seed,
            start_from=shipped_start(), overrides=self.size.overrides)

    def run(self) -> None:
        """Run all phases. UserError where another demo was begun in the folder."""
        continued_plan(self.options)  # before any work
        self.out.mkdir(parents=True, exist_ok=True)
        self.draw_first()
        # a phase that reads only earlier results has no inputs of its own: the chain has theirs
        self.phase("data", repr(self.data_arguments()), self.data, self.build_data)
        self.phase("train", "", self.model, lambda: train(self.options, dry_run=False))
        self.phase("report", "", self.out / "report.json", self.report)
        self._finish_report()

    def draw_first(self) -> None:
        """Draw with the model that ships, so that there is something to see at once."""
        path = self.out / "first.png"
        if path.exists():
            return
        # no phase: what is trained does not depend on it
        model = TextToImage.from_pretrained()
        images = model.generate(list(FIRST_CAPTIONS), seed=self.seed).images
        cells = list(zip(FIRST_CAPTIONS, images, strict=True))
        labelled_grid([("drawn by the model that ships", cells)]).save(path)
        log.info("drawn by the model that ships: %s; now one of your own is trained", path)

    def data_arguments(self) -> dict[str, Any]:
        """Arguments of `build_emoji`: without npm, the emoji of the pip package."""
        has_npm = shutil.which("npm") is not None
        return {"size": PIXELS, "styles": list(STYLES if has_npm else PIP_STYLES),
                "source": "npm" if has_npm else "pip", "num_concepts": self.size.concepts,
                "seed": self.seed}

    def build_data(self) -> None:
        """Build the set."""
        arguments = self.data_arguments()
        if arguments["source"] == "pip":
            log.warning("npm is not on PATH: the demo uses the emoji of the pip packages, in one "
                        "style only")
        # of a phase that was killed
        shutil.rmtree(self.data, ignore_errors=True)
        build_emoji(self.data, **arguments)

    def report(self) -> None:
        """Sample, measure, draw."""
        model = TextToImage.from_pretrained(self.model)
        unseen = open_dataset(self.data, split="unseen_concept")
        reconstruction = evaluate_reconstruction(model.image_tokenizer, unseen)
        scores = self._sample_splits(model)
        write_json_atomic(self.out / "report.json", {
            "caption_accuracy": scores["train"]["accuracy"],
            "reconstruction_psnr": reconstruction["psnr"],
            "caption_accuracy_details": scores["train"],
            "unseen_style_accuracy_details": scores.get("unseen_style"),
            "reconstruction_details": reconstruction,
            "sampling": model.default_params.plain(),
        })

    def _sample_splits(self, model: TextToImage) -> dict[str, dict[str, Any]]:
        """Sample captions of every split into samples.png -> caption accuracy by split."""
        train_split = open_dataset(self.data, split="train")
        reference = TrainingPictures(train_split, model.image_tokenizer.config.resolution)
        existing = list_splits(self.data)
        sections, scores = [], {}
        for split, title in SPLITS.items():
            if split not in existing:  # one style alone has no unseen style
                continue
            source = open_dataset(self.data, split=split)
            questions = choose_questions(source, QUESTIONS, self.seed)
            images = sample_questions(model, questions, self.seed, f"sample {split}")
            # no training image has the base caption of an unseen concept
            if split != "unseen_concept":
                scores[split] = reference.score(images, questions)
            captions = [question.caption for question in questions]
            sections.append((title, list(zip(captions, images, strict=True))[:SHOWN]))
        labelled_grid(sections).save(self.out / "samples.png")
        return scores

    def _finish_report(self) -> None:
        """Add the seconds of each phase and the environment, and print where everything is."""
        path = self.out / "report.json"
        # also where the report is reused: these are of this call
        report = json.loads(path.read_text(encoding="utf-8"))
        seconds = {name: phase["seconds"] for name, phase in self.phases.items()}
        report["seconds"] = {**seconds, "all": round(sum(seconds.values()), 1)}
        report["reused"] = [name for name, phase in self.phases.items() if phase["reused"]]
        report["environment"] = environment()
        write_json_atomic(path, report)

        for name in ("caption_accuracy", "reconstruction_psnr"):
            print(f"{name}: {report[name]:.3f}")
        print(f"pictures: {self.out / 'samples.png'}   training: {self.model / 'report.html'}   "
              f"report: {path}")
        print(f'try: tokenloom generate "a red heart" --model {self.model} --num-images 4 '
              '--out pictures')


def run(argv: Sequence[str] | None) -> int:
    """Run the demo from command-line arguments."""
    parser = OneLineParser(prog="python -m training.demo",
                           description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="demo", help="folder for everything (default: demo)")
    parser.add_argument("--size", default="full", help=f"one of {', '.join(SIZES)} (default: full)")
    parser.add_argument("--seed", type=seed_number, default=0)
    args = parser.parse_args(argv)
    check_demo_folder(args.out)
    setup_console(is_first=True)
    Demo(Path(args.out), args.size, args.seed).run()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and turn errors into one line and an exit code."""
    return run_command(run, argv, "demo")


if __name__ == "__main__":
    sys.exit(main())
