"""`tokenloom serve` as a process of its own, for tests that send signals or measure memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx

from tests import launching
from tests.serving_http import wait_for


class Process:
    """`tokenloom serve` on a tiny model, on a free port."""

    def __init__(self, folder: Path, log: Path, *options: str) -> None:
        self.log = log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tokenloom", "serve", str(folder), "--port", "0", *options], cwd=launching.REPOSITORY,
            env=launching.environment(), stdout=subprocess.PIPE, stderr=self.log, text=True)
        line = self.process.stdout.readline()
        self.url = line.split(" at ")[1].split(" ")[0]
        self.http = httpx.Client(base_url=self.url, trust_env=False, timeout=120)
        wait_for(lambda: self.http.get("/ready").status_code == 200, 120)

    def resident_bytes(self) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        [size] = [line.split()[1] for line in lines if line.startswith("VmRSS:")]
        return int(size) * 1024

    def close(self) -> None:
        self.http.close()
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()
