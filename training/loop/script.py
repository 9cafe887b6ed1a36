"""What the training scripts do with their command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from training.config.loading import load_config
from training.config.run import RunConfig
from training.engine.agreement import check_same, check_shared
from training.engine.launch import processes
from training.engine.processes import Processes, peers_may_go
from training.loop.log import setup_console
from training.loop.loop import Task, run_training
from training.loop.writers import check_writers
from training.runs.run_state import RunState, environment


class Training(Protocol):
    """One run, set up."""

    @property
    def run_state(self) -> RunState: ...

    def task(self) -> Task:
        """The run as the training loop sees it."""

    def finish(self) -> None:
        """Measure and export what was trained."""


def train_from_command_line(argv: Sequence[str] | None, config_class: type[RunConfig],
                            training_class: Callable[[Any, Processes], Training], script: str, description: str) -> int:
    """Read the config, train, and export; a run that was complete is exported again only if its folder is missing."""
    config = load_config(config_class, sys.argv[1:] if argv is None else argv, script, description)
    with processes(config.train.threads) as group, peers_may_go(group):
        setup_console(group.is_first)
        group.first_does(lambda: check_writers(config.log))
        check_same(group, config.plain(), "the config")
        check_same(group, environment()["packages"], "what is installed")
        check_shared(group, Path(config.run_dir), f"--run_dir {config.run_dir}")
        training = training_class(config, group)
        trained = run_training(training.task(), config, group, training.run_state)
        if trained or not (training.run_state.run_dir / "model").exists():
            training.finish()
    return 0
