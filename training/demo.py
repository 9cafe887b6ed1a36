"""The whole way in one command: real emoji -> image tokenizer -> caption transformer -> pictures and a measured report.

    python -m training.demo --out demo            # what `make demo` runs; about 15 minutes on 2 CPU cores
    python -m training.demo --out demo --size quick   # the same way in two minutes, with poor pictures

Leaves OUT/model (the model folder), samples.png, curves.png and report.json. What a second run finds done, it reuses.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from inference import TextToImage
from tokenloom_common.errors import OneLineParser, RunFailedError, choose, run_command
from tokenloom_common.files import refuse_others, write_json_atomic
from training.data.builders.emoji import build_emoji
from training.data.sources.open_dataset import list_splits, open_dataset
from training.evaluation.caption_accuracy import (
    TrainingPictures,
    choose_questions,
    sample_questions,
)
from training.evaluation.plots import plot_curves
from training.evaluation.reconstruction import evaluate_reconstruction
from training.evaluation.sheets import labelled_grid
from training.loop.log import setup_console
from training.runs.metrics import read_metrics
from training.runs.environment import environment

log = logging.getLogger("training.demo")

RECIPES = Path(__file__).parent / "recipes"
SCRIPTS = Path(__file__).parent
QUESTIONS = 100
SHOWN = 24


@dataclass(frozen=True)
class DemoSize:
    """How much of everything. None: every concept that the emoji set has."""

    tokenizer_concepts: int | None
    caption_concepts: int
    overrides: tuple[str, ...] = ()


ALL_STYLES = ("noto", "twemoji", "fluent-flat", "fluent-3d")
CAPTION_STYLES = ("noto", "fluent-3d")
PIP_STYLES = ("twemoji",)
OWN_NAMES = ("data", "tokenizer", "tokens", "seq2seq", "model", "phases", "samples.png", "curves.png", "report.json", ".*")
TOKENIZER_RECIPE = RECIPES / "demo_tokenizer.yaml"
SEQ2SEQ_RECIPE = RECIPES / "demo_seq2seq.yaml"
SIZES = {"full": DemoSize(None, 240), "quick": DemoSize(60, 40, ("--train.steps", "30"))}


class Demo:
    """Phases that each leave a note of what they were made from, so that the next run can tell what still holds."""

    def __init__(self, out: Path, size: str, seed: int) -> None:
        self.out, self.size, self.seed = out, choose(SIZES, size, "--size"), seed
        self.phases: dict[str, dict[str, Any]] = {}
        self.pictures, self.captioned = out / "data" / "pictures", out / "data" / "captioned"
        self._chain = f"{size}/{seed}/{torch.cuda.is_available()}"

    def phase(self, name: str, inputs: str, result: Path, work: Callable[[], None]) -> None:
        """Run `work`, or reuse `result` when a former run made it from the same inputs."""
        self._chain = hashlib.blake2b(f"{self._chain}|{name}|{inputs}".encode(), digest_size=8).hexdigest()
        note = self.out / "phases" / f"{name}.json"
        known = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        if known.get("made_from") == self._chain and result.exists():
            log.info("%s: done before (%.0f s), reused: %s", name, known["seconds"], result)
            self.phases[name] = {"seconds": known["seconds"], "reused": True}
            return
        log.info("== %s", name)
        started = time.perf_counter()
        work()
        seconds = round(time.perf_counter() - started, 1)
        write_json_atomic(note, {"made_from": self._chain, "seconds": seconds})
        log.info("%s: %.0f s", name, seconds)
        self.phases[name] = {"seconds": seconds, "reused": False}

    def launch(self, script: str, *arguments: str) -> None:
        """Run a training script through the `deepspeed` launcher: on up to 8 GPUs, or with 2 processes on the CPU."""
        available = min(8, torch.cuda.device_count()) if torch.cuda.is_available() else min(2, len(os.sched_getaffinity(0)))
        count = 1 << (available.bit_length() - 1)  # a power of two divides the recipes' batches
        command = [str(Path(sys.executable).with_name("deepspeed")), "--log_level", "warning",
                   "--num_accelerators", str(count),
                   "--master_port", str(_free_port()), str(SCRIPTS / script), *arguments]
        if not Path(command[0]).is_file():
            command[0] = "deepspeed"
        log.info("$ %s", " ".join(command))
        code = subprocess.run(command, check=False).returncode
        if code:
            raise RunFailedError(f"{script} ended with exit code {code}; its reason is printed above")

    def run(self) -> None:
        """All phases. UserError if OUT holds anything that is not a demo's."""
        refuse_others(self.out, OWN_NAMES)
        self.out.mkdir(parents=True, exist_ok=True)
        self.phase("data", repr(self.data_arguments()), self.captioned, self.build_data)
        self.phase("tokenizer", TOKENIZER_RECIPE.read_text(encoding="utf-8"), self.out / "tokenizer" / "model",
                   self.train_tokenizer)
        self.phase("encode", "", self.out / "tokens", self.encode)
        self.phase("seq2seq", SEQ2SEQ_RECIPE.read_text(encoding="utf-8"), self.out / "model", self.train_seq2seq)
        self.phase("report", "", self.out / "report.json", self.report)
        self._finish_report()

    def data_arguments(self) -> list[tuple[Path, dict[str, Any]]]:
        """Two sets of real emoji: many pictures for the tokenizer, fewer concepts for the transformer to learn by name."""
        npm = shutil.which("npm") is not None
        shared = {"size": yaml.safe_load(TOKENIZER_RECIPE.read_text(encoding="utf-8"))["model"]["resolution"],
                  "source": "npm" if npm else "pip", "seed": self.seed}
        styles = (ALL_STYLES, CAPTION_STYLES) if npm else (PIP_STYLES, PIP_STYLES)
        return [(self.pictures, {**shared, "styles": list(styles[0]), "num_concepts": self.size.tokenizer_concepts}),
                (self.captioned, {**shared, "styles": list(styles[1]), "num_concepts": self.size.caption_concepts})]

    def build_data(self) -> None:
        """Build both sets."""
        if shutil.which("npm") is None:
            log.warning("npm is not on PATH: the demo uses the emoji of the pip packages, in one style only")
        for folder, arguments in self.data_arguments():
            shutil.rmtree(folder, ignore_errors=True)
            build_emoji(folder, **arguments)

    def train_tokenizer(self) -> None:
        """The image tokenizer, on the training split."""
        self.launch("train_tokenizer.py", "--config", str(TOKENIZER_RECIPE), "--data.path", str(self.pictures), "--run_dir",
                    str(self._fresh("tokenizer")), "--seed", str(self.seed), *self.size.overrides)

    def encode(self) -> None:
        """Every split of the captioned set as tokens."""
        self.launch("encode_dataset.py", "--image_tokenizer", str(self.out / "tokenizer" / "model"), "--data.path",
                    str(self.captioned), "--out", str(self.out / "tokens"))

    def train_seq2seq(self) -> None:
        """The transformer; its export becomes OUT/model."""
        self.launch("train_seq2seq.py", "--config", str(SEQ2SEQ_RECIPE), "--data.path", str(self.out / "tokens"),
                    "--image_tokenizer", str(self.out / "tokenizer" / "model"), "--run_dir",
                    str(self._fresh("seq2seq")), "--seed", str(self.seed), *self.size.overrides)
        shutil.rmtree(self.out / "model", ignore_errors=True)
        shutil.copytree(self.out / "seq2seq" / "model", self.out / "model")

    def _fresh(self, name: str) -> Path:
        """A run folder of this demo: kept when a killed demo left checkpoints of the same phase, else made anew."""
        folder, note = self.out / name, self.out / "phases" / f"{name}.started"
        if not (note.is_file() and note.read_text(encoding="utf-8") == self._chain):
            shutil.rmtree(folder, ignore_errors=True)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(self._chain, encoding="utf-8")
        return folder

    def report(self) -> None:
        """Sample, measure, draw."""
        model = TextToImage.from_pretrained(self.out / "model")
        train = open_dataset(self.captioned, split="train")
        held_out = evaluate_reconstruction(model.image_tokenizer, open_dataset(self.pictures, split="unseen_concept"))
        trained = evaluate_reconstruction(model.image_tokenizer, open_dataset(self.pictures, split="train"))
        reference = TrainingPictures(train, model.image_tokenizer.config.resolution)
        sections, scores = [], {}
        for split, title in (("train", "captions seen in training"),
                             ("unseen_style", "concepts seen in the other style only"),
                             ("unseen_concept", "concepts never seen")):
            if split not in list_splits(self.captioned):  # one style alone has no unseen style
                continue
            questions = choose_questions(open_dataset(self.captioned, split=split), QUESTIONS, self.seed)
            images = sample_questions(model, questions, self.seed, f"sample {split}")
            if split != "unseen_concept":  # no training picture has the base caption of an unseen concept
                scores[split] = reference.score(images, questions)
            sections.append((title, [(q.caption, image) for q, image in zip(questions, images, strict=True)][:SHOWN]))
        labelled_grid(sections).save(self.out / "samples.png")
        self._draw_curves()
        write_json_atomic(self.out / "report.json", {
            "caption_accuracy": scores["train"]["accuracy"],
            "codebook_usage": trained["codebook_usage"],
            "reconstruction_psnr": held_out["psnr"],
            "caption_accuracy_details": scores["train"],
            "unseen_style_accuracy_details": scores.get("unseen_style"),
            "reconstruction_details": {"held_out": held_out, "training": trained},
            "sampling": model.default_params.plain(),
        })

    def _draw_curves(self) -> None:
        tokenizer = read_metrics(self.out / "tokenizer" / "metrics.jsonl")
        seq2seq = read_metrics(self.out / "seq2seq" / "metrics.jsonl")
        plot_curves([("image tokenizer: loss", tokenizer, ["loss", "l1"]),
                     ("image tokenizer: share of codes used", tokenizer, ["codebook_usage"]),
                     ("transformer: nats a token", seq2seq, ["loss"])], self.out / "curves.png")

    def _finish_report(self) -> None:
        """Put the seconds of each phase and the environment into the report, and say where everything is."""
        path = self.out / "report.json"
        report = json.loads(path.read_text(encoding="utf-8"))
        report["seconds"] = {name: phase["seconds"] for name, phase in self.phases.items()}
        report["seconds"]["all"] = round(sum(report["seconds"].values()), 1)
        report["reused"] = [name for name, phase in self.phases.items() if phase["reused"]]
        report["environment"] = environment()
        write_json_atomic(path, report)
        for name in ("caption_accuracy", "codebook_usage", "reconstruction_psnr"):
            print(f"{name}: {report[name]:.3f}")
        print(f"pictures: {self.out / 'samples.png'}   curves: {self.out / 'curves.png'}   report: {path}")
        print(f'try: tokenloom generate "a red heart" --model {self.out / "model"} --num-images 4 --out pictures')


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(argv: Sequence[str] | None) -> int:
    """Parse and run."""
    parser = OneLineParser(prog="python -m training.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="demo", help="folder for everything (default: demo)")
    parser.add_argument("--size", default="full", help=f"one of {', '.join(SIZES)} (default: full)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    setup_console(is_first=True)
    Demo(Path(args.out), args.size, args.seed).run()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command(run, argv, "demo")


if __name__ == "__main__":
    sys.exit(main())
