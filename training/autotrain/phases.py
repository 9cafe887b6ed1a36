"""Phases of a long job: each notes its inputs, so that the next run knows which results hold."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenloom_common.files import write_json_atomic

log = logging.getLogger(__name__)

PHASES = "phases"
"""Folder of the notes, in the job's own."""


class PhaseRunner:
    """Run phases in order; one whose inputs changed makes itself and all later ones again."""

    def __init__(self, out: Path, job: str) -> None:
        """job: everything that all phases depend on."""
        self.out = out
        self.phases: dict[str, dict[str, Any]] = {}
        self._chain = job
        """Hash of the inputs of all phases so far."""

    def phase(self, name: str, inputs: str, result: Path, work: Callable[[], None]) -> None:
        """Run `work`, or reuse `result` when an earlier run made it from the same inputs."""
        chained = f"{self._chain}|{name}|{inputs}"
        self._chain = hashlib.blake2b(chained.encode(), digest_size=8).hexdigest()
        path = self.out / PHASES / f"{name}.json"
        # written last, so that a phase which was killed has none
        note = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if note.get("made_from") == self._chain and result.exists():
            log.info("%s: done before (%.0f s), reused: %s", name, note["seconds"], result)
            self.phases[name] = {"seconds": note["seconds"], "reused": True}
            return

        log.info("== %s", name)
        started = time.perf_counter()
        work()
        seconds = round(time.perf_counter() - started, 1)
        write_json_atomic(path, {"made_from": self._chain, "seconds": seconds})
        log.info("%s: %.0f s", name, seconds)
        self.phases[name] = {"seconds": seconds, "reused": False}

    def continued_folder(self, name: str) -> Path:
        """Return a folder of this phase, with what a killed run left there of the same phase."""
        folder, note = self.out / name, self.out / PHASES / f"{name}.started"
        is_same_phase = note.is_file() and note.read_text(encoding="utf-8") == self._chain
        if not is_same_phase:
            shutil.rmtree(folder, ignore_errors=True)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(self._chain, encoding="utf-8")
        return folder
