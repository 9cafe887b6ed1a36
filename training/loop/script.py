"""The command line of the training scripts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenloom_common.errors import run_command
from training.config.loading import load_config
from training.config.run import RunConfig
from training.engine.agreement import check_same, check_shared
from training.engine.launch import processes
from training.engine.processes import Processes, peers_may_go
from training.loop.log import setup_console
from training.loop.loop import run_training
from training.loop.trained import Training
from training.loop.writers import check_writers
from training.places import check_run_dir
from training.runs.environment import environment


def train_from_command_line(argv: Sequence[str] | None, config_class: type[RunConfig],
                            training_class: Callable[[Any, Processes], Training], script: str,
                            description: str) -> int:
    """Read the config, train, and export; turn errors into one line and an exit code.

    A run that was complete is exported again only if its model folder is missing.
    """
    def run(argv: Sequence[str] | None) -> int:
        arguments = sys.argv[1:] if argv is None else argv
        _train(load_config(config_class, arguments, script, description), training_class)
        return 0

    return run_command(run, argv, script)


def _train(config: RunConfig, training_class: Callable[[Any, Processes], Training]) -> None:
    with processes(config.train.threads) as group, peers_may_go(group):
        setup_console(group.is_first)
        data_path = config.plain()["data"]["path"]  # every kind of run has one
        group.first_does(lambda: check_run_dir(config.run_dir, data_path=data_path))

        # processes that differ would train what nobody asked for, or wait for one another for ever
        group.first_does(lambda: check_writers(config.log))
        check_same(group, config.plain(), "the config")
        check_same(group, environment()["packages"], "what is installed")
        check_shared(group, Path(config.run_dir), f"--run_dir {config.run_dir}")

        training = training_class(config, group)
        trained = run_training(training.task(), config, group, training.run_state)
        if trained or not (training.run_state.run_dir / "model").exists():
            training.finish()
