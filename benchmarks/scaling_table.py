"""The table of docs/scaling.md: how Parti's sizes would train on many GPUs, by calculation.

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
GPU, MFU = "H100", 0.4  # MFU: share of the GPU's peak FLOP/s that a step uses, an assumption
BATCH, STEPS = 8192, 450_000  # Yu et al. 2022, section 3
# Yu et al. 2022: SentencePiece of 16,000, 128 ids; 32 x 32 tokens of 8192 codes
DERIVED = {"text_vocab_size": 16_000, "text_length": 128, "codebook_size": 8192, "grid": (32, 32)}
HEADER = ("| model | GPUs | ZeRO stage | micro-batch x accumulation | checkpointing | GB a GPU "
          "| main memory, GB a GPU | hours | checkpoint, GB |\n"
          "|---|---|---|---|---|---|---|---|---|")


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
        """Format a row of the table."""
        if self.change is None:
            return f"| {self.model} | {self.processes} | does not fit | | | | | | |"
        micro = BATCH // (self.processes * self.change.accumulation)
        checkpointing = "yes" if self.change.checkpointing else "no"
        return (f"| {self.model} | {self.processes} | {self.change.stage} "
                f"| {micro} x {self.change.accumulation} | {checkpointing} "
                f"| {self.total / 1e9:.1f} | {self.host / 1e9:.1f} "
                f"| {self.hours:,.0f} | {self.checkpoint / 1e9:,.0f} |")


def plan_of_size(name: str) -> Plan:
    """Plan a published size with Parti's batch and steps, AdamW in bfloat16, from stage 0 on.

    No samples are drawn during the run. No dropout: with it, attention on CUDA runs in blocks
    instead of flex attention.
    """
    values = {
        "run_dir": "RUN", "data": {"path": "TOKENS"}, "image_tokenizer": "TOKENIZER",
        "model": {"preset": name, "dropout": 0.0},
        "train": {"batch_size": BATCH, "steps": STEPS, "sample_every": 0},
        "deepspeed": {"zero_stage": 0}}
    config = Seq2SeqRunConfig.parse(values, "scaling")
    plan = seq2seq_plan(config, "bfloat16", config.model.build(DERIVED))
    known: dict[tuple[int, bool], Activations] = {}

    def activations(count: int, checkpointing: bool, cuda: bool) -> Activations:
        # equal for every number of GPUs, and slow to count
        if (count, checkpointing) not in known:
            known[count, checkpointing] = plan.activations(count, checkpointing, cuda)
        return known[count, checkpointing]

    return replace(plan, activations=activations)


# kept, since a test reads the rows of a size more than once
@lru_cache(maxsize=len(SIZES))
def rows_of_size(name: str) -> list[Row]:
    """Return a row for each number of GPUs, with the fewest changes that make the plan fit."""
    plan = plan_of_size(name)
    memory = GPU_MEMORY[GPU] * 10**9  # bytes
    flops_per_s = MFU * (peak_flops(GPU, plan.precision) or 0)
    seconds = plan.flops() * BATCH * STEPS / flops_per_s

    rows = []
    for processes in PROCESSES:
        fitting = MemoryFit(plan, processes, cuda=True)
        change = fitting.smallest_change(memory)
        hours = seconds / processes / 3600
        total = host = checkpoint = 0
        needed = None if change is None else fitting.memory(change)
        if change is not None and needed is not None:
            total, host = needed.total, needed.host
            checkpoint = checkpoint_bytes(plan, change.stage)
        rows.append(Row(name, processes, change, total, host, hours, checkpoint))
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
