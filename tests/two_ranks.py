"""One of two processes that train a small module in every mode and meet numbers that are not finite, on one of them alone.

    RANK=... python tests/two_ranks.py OUT      (a JSON file for each rank)
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.small_engine import (
    batch,
    config,
    engine_for,
    not_differentiable_here,
    small,
    squared_error,
    train,
)
from training.engine.deepspeed_engine import Engine
from training.engine.launch import processes
from training.engine.processes import Processes

BAD_RANK = 1


def modes() -> list[tuple[int, str]]:
    """Every stage and precision that this machine has."""
    found = [(stage, precision) for stage in range(4) for precision in ("float32", "bfloat16")]
    return found + [(stage, "float16") for stage in (1, 2, 3) if torch.ops.mkldnn._is_mkldnn_fp16_supported()]


def one_step(engine: Engine, group: Processes, kind: str, step: int) -> None:
    """A step that is wrong on one rank."""
    ids, target = batch(step + 100 * group.rank, group.device)
    prediction = engine(ids)
    loss = squared_error(prediction, target)
    if group.rank == BAD_RANK:
        loss = {"loss": lambda: loss + math.nan, "gradient": lambda: loss + not_differentiable_here(prediction),
                "input": lambda: squared_error(prediction, target * math.inf)}[kind]()
    engine.backward(loss, step + 1)
    engine.step(step + 1)


def outcome(group: Processes, stage: int, precision: str, kind: str) -> dict[str, Any]:
    """What became of weights and counts."""
    run = config(stage, batch_size=16)
    engine = engine_for(small(), run, group, precision)
    train(engine, run, group, range(2))
    skipped, before = engine.skipped, engine.full_state()
    one_step(engine, group, kind, 2)
    after = engine.full_state()
    counted = engine.skipped - skipped
    losses = train(engine, run, group, range(3, 5))
    last = engine.full_state()
    return {"mode": [stage, precision, kind], "skipped": counted,
            "unchanged": all(torch.equal(before[name], after[name]) for name in before),
            "finite": all(bool(torch.isfinite(value).all()) for value in last.values()),
            "losses finite": all(math.isfinite(loss) for loss in losses),
            "went on": precision == "float16" or any(not torch.equal(after[name], last[name]) for name in last),
            "digest": float(sum(value.double().sum() for value in last.values()))}


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with processes(threads=1) as group:
        found = [outcome(group, *mode, kind) for mode in modes() for kind in ("loss", "gradient", "input")]
        # one that leaves while the other still talks to it was seen to end in an abort of torch's threads
        torch.distributed.barrier()
        Path(sys.argv[1]).joinpath(f"rank{group.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
