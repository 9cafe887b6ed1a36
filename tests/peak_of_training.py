"""Train at every ZeRO stage in turn, as one process of a run, and measure the peak memory of each.

    [RANK=... ] python tests/peak_of_training.py OUT PRECISION      (a JSON file for each rank)

Freed memory is handed back at once (MALLOC_MMAP_THRESHOLD_), or the allocator's habits would be
measured. A small run at stages 1 and 3 comes first, so that memory of the first use of kernels and
libraries is not in the figures.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import _status
from benchmarks.training import make_data
from benchmarks.training_loops import Options, run_config
from training.engine.launch import processes
from training.engine.processes import Processes
from training.loop.loop import run_training
from training.planning.plan import plan_of
from training.planning.rank_memory import rank_memory, sharding_of
from training.train_seq2seq import Seq2SeqTraining

LARGE = {"width": 384, "layers": 4, "grid": 8, "batch": 8}  # 14 million numbers
TINY = {"width": 64, "layers": 1, "grid": 4, "batch": 2}


def measure(folder: Path, sizes: dict[str, int], stage: int, precision: str,
            group: Processes) -> dict[str, float]:
    """Run two steps and the export -> measured and predicted bytes beyond those before."""
    options = Options(False, **sizes, steps=2, stages=[stage], repeats=1, device="cpu",
                      dtype=precision, threads=1)
    if group.is_first and not (folder / "tokens").exists():
        folder.mkdir(parents=True, exist_ok=True)
        make_data(folder, options)
    group.barrier()
    # run_config makes a new folder: the first process's is everyone's
    shared = group.first_does(lambda: str(run_config(folder, options, stage).run_dir))
    config = run_config(folder, options, stage).model_copy(update={"run_dir": shared})
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = _status("VmRSS")
    training = Seq2SeqTraining(config, group)
    run_training(training.task(), config, group, training.run_state)
    training.finish()
    measured = _status("VmHWM") - before

    plan = plan_of(config, precision, model=training.model.config,
                   tokenizer=training.image_tokenizer.config)
    activations = plan.activations(options.batch // group.world_size, False, False)
    memory = rank_memory(plan, sharding_of(plan, stage, group.world_size, False), activations)
    return {"zero_stage": stage, "measured": measured, "process": memory.process,
            "predicted": memory.total - memory.process}


def main() -> None:
    """Measure every stage after a warm-up, into rank0.json and so on."""
    out, precision = Path(sys.argv[1]), sys.argv[2]
    with processes(1) as group:
        first = [measure(out / "tiny", TINY, stage, precision, group) for stage in (1, 3)]
        rows = [measure(out / "large", LARGE, stage, precision, group) for stage in (0, 1, 2, 3)]
        (out / f"rank{group.rank}.json").write_text(json.dumps({"first": first, "rows": rows}))


if __name__ == "__main__":
    assert os.environ.get("MALLOC_MMAP_THRESHOLD_"), "set by the test"
    main()
