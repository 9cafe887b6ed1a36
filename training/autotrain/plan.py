"""The plan of a training: what was asked for, the facts, and the choices; kept in plan.json."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from inference.shipped import default_model_folder
from tokenloom_common.errors import MissingFileError, UserError
from training.autotrain.choices import Choices, Times, choose
from training.autotrain.clock import Clock
from training.autotrain.facts import (
    DataFacts,
    MachineFacts,
    StartFacts,
    look_at_data,
    look_at_machine,
    look_at_start,
)
from training.autotrain.places import read_plan, training_folder
from training.autotrain.probe import ProbeWorkers
from training.autotrain.shapes import Shape
from training.autotrain.speeds import MeasuredSpeeds
from training.autotrain.words import Line, choice_lines, format_lines, notes_of
from training.data.sources.open_dataset import open_dataset

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOptions:
    """A request for a training. reading: options of `open_dataset`; start_from: a model folder."""

    data: str
    out: str
    minutes: float
    split: str | None = None
    size: int | None = None
    seed: int = 0
    start_from: str | None = None
    max_bad_fraction: float = 0.01
    reading: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, list[str]] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Facts that a continued training must share with the one that was begun."""
        values = asdict(self)
        del values["out"]
        return {**values, "data": _place(self.data)}


def _place(data: str) -> str:
    return str(Path(data).resolve()) if Path(data).exists() else data


def shipped_start() -> str | None:
    """Return the folder of the model that ships; None in an installation without it."""
    try:
        return str(default_model_folder())
    except MissingFileError:
        return None


@dataclass(frozen=True)
class Plan:
    """Choices, and the facts that they follow from."""

    choices: Choices
    data: DataFacts
    machine: MachineFacts
    start_seconds: float

    def plain(self, options: TrainOptions) -> dict[str, Any]:
        """Return the contents of plan.json."""
        return {"arguments": options.plain(), **asdict(self)}

    @classmethod
    def read(cls, values: dict[str, Any]) -> Plan:
        """Read plan.json's contents."""
        choices = dict(values["choices"])
        choices["shape"] = Shape(**choices["shape"])
        choices["times"] = Times(**choices["times"])
        return cls(Choices(**choices), DataFacts(**values["data"]),
                   MachineFacts(**values["machine"]), values["start_seconds"])


def make_plan(options: TrainOptions, clock: Clock) -> Plan:
    """Look at data and machine, measure, and choose. DataError for unusable data."""
    source = open_dataset(options.data, split=options.split, **options.reading)
    data = look_at_data(source, options.split, options.reading)
    machine = look_at_machine()
    start: StartFacts | None = None
    if options.start_from is not None:
        start = look_at_start(options.start_from, source)
        if changes_transformer(options.overrides):
            start = replace(start, captions_fit=0.0)
    log.info("measuring the speed of training on this machine ...")
    with ProbeWorkers(machine.processes) as workers:
        speeds = MeasuredSpeeds(workers, data, machine, options.overrides)
        choices = choose(data, machine, clock.left, speeds, start, options.size)
    return Plan(choices, data, machine, speeds.start_seconds)


def changes_transformer(overrides: dict[str, list[str]]) -> bool:
    """Whether the user's keys make another transformer than that of the start, or other codes."""
    keys = [f"{stage}{word.removeprefix('-')}" for stage, words in overrides.items()
            for word in words[::2]]
    return any(key.startswith(("transformer-model", "transformer-text",
                               "tokenizer-train.trained_part")) for key in keys)


def plan_lines(plan: Plan, options: TrainOptions) -> list[Line]:
    """Say the choices, and the keys that the user set over them."""
    lines = choice_lines(plan.choices, plan.data, plan.machine)
    own = []
    for stage, words in options.overrides.items():
        for key, value in zip(words[::2], words[1::2], strict=True):
            own.append(f"--{stage}.{key.removeprefix('--')} {value}")
    if own:
        lines.append(Line("set by you", " ".join(own), "counts more than what is said above"))
    return lines


def say_plan(plan: Plan, options: TrainOptions) -> None:
    """Print the choices, one line each, and what to expect."""
    lines = format_lines(plan_lines(plan, options))
    lines += [f"note: {note}" for note in notes_of(plan.choices, plan.data)]
    # now: what the scripts print comes after it, also in a file
    print("\n".join(lines), flush=True)


def _difference(name: str, begun: Any, asked: Any) -> str:
    """Say how an argument of the training that was begun differs, in the words of its options."""
    if name == "overrides":
        return "other --tokenizer and --transformer keys"
    if name == "reading":
        return "other options of how the data is read"
    if name == "start_from":
        return f"another start ({begun or '--from-scratch'}, not {asked or '--from-scratch'})"
    return f"another --{name.replace('_', '-')} ({begun}, not {asked})"


def check_same_data(images: int, plan: Plan, options: TrainOptions) -> None:
    """UserError where the data has another number of images than when the training was begun."""
    if images != plan.data.images:
        raise UserError(f"{options.data}: held {plan.data.images:,} images when the training in "
                        f"{training_folder(options.out)} was begun, and holds {images:,} now; give "
                        "another --out, or delete that folder")


def continued_plan(options: TrainOptions) -> Plan | None:
    """Return the plan that was begun with the same arguments; None where none was begun.

    UserError, naming the argument, for another one: its results would be mixed with this one's.
    """
    folder = training_folder(options.out)
    values = read_plan(folder)
    if values is None:
        return None
    begun, asked = values["arguments"], json.loads(json.dumps(options.plain()))
    for name, value in asked.items():
        if begun.get(name) != value:
            raise UserError(f"--out {options.out}: {folder} was begun with "
                            f"{_difference(name, begun.get(name), value)}; give the same, or "
                            "another --out, or delete that folder")
    return Plan.read(values)
