"""The table of docs/scaling.md: how Parti's sizes would train on many GPUs. Calculated, nothing of it measured.

    python -m benchmarks.scaling_table             (a few minutes: the largest size has 80 layers)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from training.config.seq2seq import Seq2SeqRunConfig
from training.engine.gpus import GPU_MEMORY, peak_flops
from training.planning.activations import Activations
from training.planning.fits import MemoryFit, MemoryOptions
from training.planning.plan import Plan, seq2seq_plan
from training.planning.rank_memory import checkpoint_bytes

SIZES = ("parti-350m", "parti-750m", "parti-3b", "parti-20b")
PROCESSES = (8, 64, 256)
GPU, MFU = "H100", 0.4
BATCH, STEPS = 8192, 450_000  # Yu et al. 2022, section 3
DERIVED = {"text_vocab_size": 16_000, "text_length": 128, "codebook_size": 8192, "grid": (32, 32)}
HEADER = ("| model | GPUs | ZeRO stage | micro-batch x accumulation | checkpointing | GB a GPU | main memory, GB a GPU | hours "
          "| checkpoint, GB |\n|---|---|---|---|---|---|---|---|---|")


class Row(NamedTuple):
    """One model on one number of GPUs; None where nothing fits."""

    model: str
    processes: int
    change: MemoryOptions | None
    total: int
    host: int
    hours: float
    checkpoint: int

    def line(self) -> str:
        """As a row of the table."""
        if self.change is None:
            return f"| {self.model} | {self.processes} | does not fit | | | | | | |"
        micro = BATCH // (self.processes * self.change.accumulation)
        return (f"| {self.model} | {self.processes} | {self.change.stage} | {micro} x {self.change.accumulation} | "
                f"{'yes' if self.change.checkpointing else 'no'} | {self.total / 1e9:.1f} | {self.host / 1e9:.1f} | "
                f"{self.hours:,.0f} | {self.checkpoint / 1e9:,.0f} |")


def plan_of_size(name: str) -> Plan:
    """A published size with Parti's batch and steps, AdamW in bfloat16, from stage 0 on; no samples while it trains, and
    no dropout, with which its attention on CUDA goes through blocks instead of flex attention."""
    config = Seq2SeqRunConfig.parse({
        "run_dir": "RUN", "data": {"path": "TOKENS"}, "image_tokenizer": "TOKENIZER", "model": {"preset": name, "dropout": 0.0},
        "train": {"batch_size": BATCH, "steps": STEPS, "sample_every": 0}, "deepspeed": {"zero_stage": 0}}, "scaling")
    plan = seq2seq_plan(config, "bfloat16", config.model.build(DERIVED))
    looked_at: dict[tuple[int, bool], Activations] = {}

    def activations(count: int, checkpointing: bool, cuda: bool) -> Activations:
        """The same for every number of GPUs."""
        if (count, checkpointing) not in looked_at:
            looked_at[count, checkpointing] = plan.activations(count, checkpointing, cuda)
        return looked_at[count, checkpointing]

    return replace(plan, activations=activations)


@lru_cache(maxsize=len(SIZES))
def rows_of_size(name: str) -> list[Row]:
    """One row for each number of GPUs: the fewest changes of the plan with which it fits."""
    plan, memory = plan_of_size(name), GPU_MEMORY[GPU] * 10**9
    seconds = plan.flops() * BATCH * STEPS / (MFU * (peak_flops(GPU, plan.precision) or 0))
    rows = []
    for processes in PROCESSES:
        fitting = MemoryFit(plan, processes, cuda=True)
        change = fitting.smallest_change(memory)
        found = None if change is None else fitting.memory(change)
        rows.append(Row(name, processes, change, found.total if found else 0, found.host if found else 0,
                        seconds / processes / 3600, checkpoint_bytes(plan, change.stage) if change else 0))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    print(HEADER)
    for name in SIZES:
        for row in rows_of_size(name):
            print(row.line(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
