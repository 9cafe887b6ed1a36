"""Fixtures that more than one file needs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch

import tokenloom
from tests.page_browser import browser, page, stand_in  # noqa: F401
from tokenloom_common import kept_results
from training.engine.launch import processes
from training.engine.processes import Processes


def pytest_configure(config: pytest.Config) -> None:
    """Give each parallel worker one thread: more of them would wait for one another on the same cores."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
        torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--kills 100`: how often tests/test_killed.py kills a training; `--mutations 10000`: of files that are read."""
    parser.addoption("--kills", type=int, default=6)
    parser.addoption("--mutations", type=int, default=200)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory) -> Iterator[None]:
    """Choices of the user's own runs are neither read nor replaced by tests."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_results, "cache_folder", lambda: folder)
        yield


def _log_levels() -> dict[str, int]:
    loggers = logging.root.manager.loggerDict.items()
    levels = {name: logger.level for name, logger in loggers if isinstance(logger, logging.Logger)}
    return {**levels, "": logging.root.level}


@pytest.fixture(autouse=True)
def own_settings() -> Iterator[None]:
    """Take back what a test's commands set: threads (others round sums in another way), MASTER_PORT and its like, logs.

    A handler that stayed would write to the stderr of a test that is over.
    """
    before, threads = dict(os.environ), torch.get_num_threads()
    handlers, levels = list(logging.root.handlers), _log_levels()
    yield
    for handler in set(logging.root.handlers) - set(handlers):
        logging.root.removeHandler(handler)
    for name, level in _log_levels().items():
        if level != levels.get(name, logging.NOTSET):
            logging.getLogger(name).setLevel(levels.get(name, logging.NOTSET))
    if dict(os.environ) != before:
        _set_environment(before)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def one_thread() -> None:
    """Compute on one thread: sums of more are rounded in another way. `own_settings` takes it back."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def only_process_group() -> Iterator[tuple[Processes, dict[str, str]]]:
    """DeepSpeed keeps global state of the first process group it sees: there is one for all tests, with its environment."""
    before, threads = dict(os.environ), torch.get_num_threads()
    with processes(threads=1) as alone:
        inside = dict(os.environ)
        _set_environment(before)
        torch.set_num_threads(threads)
        yield alone, inside


@pytest.fixture(scope="module")
def group(only_process_group) -> Iterator[Processes]:
    """This process as a run of one; other modules, which start processes, do not see its environment."""
    alone, inside = only_process_group
    before, threads = dict(os.environ), torch.get_num_threads()
    _set_environment(inside)
    torch.set_num_threads(1)
    yield alone
    _set_environment(before)
    torch.set_num_threads(threads)


@pytest.fixture
def run(capsys, monkeypatch):
    """`tokenloom estimate ...` -> exit code, stdout, lines of stderr."""
    monkeypatch.delenv("TOKENLOOM_DEBUG", raising=False)

    def call(*arguments: object):
        code = tokenloom.main(["estimate", *map(str, arguments)])
        shown = capsys.readouterr()
        return code, shown.out, shown.err.splitlines()
    return call


def _set_environment(values: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(values)
