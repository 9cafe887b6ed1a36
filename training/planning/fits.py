"""Whether a run fits into memory, and the smallest change with which it does.

The estimate of the worst phase is good to a few per cent, but an allocator may do better or worse,
so a run is refused only for what every phase needs: parameters, their float32 copies and moments,
gradients, and half of a micro-batch's activations. All of it follows from shapes: it takes a
fraction of a second for a small model and a few for the largest, against the minutes or hours after
which a run that cannot fit would be killed without a word.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from inference.memory.available import available_memory
from inference.memory.sizes import human
from tokenloom_common.errors import UserError
from training.config.matcher import MatcherRunConfig
from training.config.run import RunConfig
from training.engine.processes import Processes, processes_here
from training.places import check_run_dir
from training.planning.activations import Activations
from training.planning.plan import Plan
from training.planning.rank_memory import (
    RankMemory,
    checkpoint_bytes,
    rank_memory,
    sharding_of,
)

MOST_GPUS = 4096  # where the search for a remedy ends


class MemoryOptions(NamedTuple):
    """The options of a run that change its memory and none of its results."""

    stage: int
    accumulation: int
    checkpointing: bool
    offload: str

    @classmethod
    def of(cls, config: RunConfig) -> MemoryOptions:
        """The options that the config sets."""
        return cls(config.deepspeed.zero_stage, config.train.accumulation,
                   config.train.gradient_checkpointing, config.deepspeed.offload)

    def changes(self, before: MemoryOptions) -> list[str]:
        """`key value` of each option that differs from `before`."""
        keys = ("deepspeed.zero_stage", "train.accumulation", "train.gradient_checkpointing",
                "deepspeed.offload")
        changed = zip(keys, self, before, strict=True)
        # lower: true and false as YAML and the command line have them
        return [f"{key} {str(new).lower()}" for key, new, old in changed if new != old]

    def applied_to(self, plan: Plan) -> Plan | None:
        """The plan with these options; None where its config refuses the combination."""
        # parsed again, not copied: the config's own checks decide which combinations are possible
        values = plan.config.plain()
        values["deepspeed"] |= {"zero_stage": self.stage, "offload": self.offload}
        values["train"] |= {"accumulation": self.accumulation,
                            "gradient_checkpointing": self.checkpointing}
        try:
            config = type(plan.config).parse(values, "plan")
        except UserError:
            return None
        return replace(plan, config=config)


class MemoryFit:
    """The memory of a plan on `processes` devices of one kind, as it is and with other options."""

    def __init__(self, plan: Plan, processes: int, cuda: bool) -> None:
        self.plan = plan
        self.processes = processes
        self.cuda = cuda
        self._known: dict[tuple[int, bool], Activations] = {}

    def activations(self, count: int, checkpointing: bool) -> Activations:
        """Activations of a micro-batch of `count` images.

        Traced for one, two and the plan's own number of images; on a straight line through one and
        two elsewhere, because a trace of a large model takes seconds.
        """
        key = (count, checkpointing)
        if key not in self._known:
            train = self.plan.config.train
            own = train.batch_size // (self.processes * train.accumulation)
            if count in (1, 2, own):
                self._known[key] = self.plan.activations(count, checkpointing, self.cuda)
            else:
                one = self.activations(1, checkpointing)
                two = self.activations(2, checkpointing)
                self._known[key] = one.towards(two, count - 1)
        return self._known[key]

    def memory(self, options: MemoryOptions, processes: int | None = None) -> RankMemory | None:
        """Memory of a process; None where the config refuses the options.

        UserError for a batch that cannot be divided.
        """
        plan = options.applied_to(self.plan)
        if plan is None:
            return None
        processes = processes or self.processes
        sharding = sharding_of(plan, options.stage, processes, self.cuda)
        micro_batch = plan.config.train.batch_size // (processes * options.accumulation)
        return rank_memory(plan, sharding, self.activations(micro_batch, options.checkpointing))

    def remedy(self, memory: int) -> str:
        """The fewest changes with which a process needs no more than `memory`, as a sentence."""
        before = MemoryOptions.of(self.plan.config)
        options = self.smallest_change(memory)
        if options is not None:
            return f"it would fit with {', '.join(options.changes(before))}"

        # no options are enough on so many processes: double them while the batch can be divided
        count = 2 * self.processes
        batch_size = self.plan.config.train.batch_size
        while count <= MOST_GPUS and batch_size % (count * before.accumulation) == 0:
            for options in (before, *self._alternatives(before, count)):
                if self._fits(options, memory, count):
                    return ", ".join([f"it would fit on {count} processes",
                                      *options.changes(before)])
            count *= 2
        return ("no ZeRO stage, accumulation or gradient checkpointing makes it fit; use a smaller "
                "model or more memory")

    def smallest_change(self, memory: int) -> MemoryOptions | None:
        """The plan's own options, or the first others with which it fits on as many processes."""
        before = MemoryOptions.of(self.plan.config)
        for options in (before, *self._alternatives(before, self.processes)):
            if self._fits(options, memory, self.processes):
                return options
        return None

    def _fits(self, options: MemoryOptions, memory: int, processes: int) -> bool:
        found = self.memory(options, processes)
        return found is not None and found.total <= memory

    def _alternatives(self, before: MemoryOptions, processes: int) -> Iterator[MemoryOptions]:
        """All other options, those with the fewest and cheapest changes first."""
        micro_batch = self.plan.config.train.batch_size // (processes * before.accumulation)
        parts = [parts for parts in range(1, micro_batch + 1) if micro_batch % parts == 0]
        if isinstance(self.plan.config, MatcherRunConfig):
            # its loss compares the captions of a micro-batch, so a smaller one is another objective
            parts = parts[:1]
        accumulations = [before.accumulation * part for part in parts]

        stages = range(before.stage, 4)
        checkpointing = sorted({before.checkpointing, True})  # to switch it off never saves memory
        offloads = [before.offload]
        if self.cuda and before.offload == "none":
            offloads.append("optimizer")

        # Offloading costs the most time, in transfers; gradient checkpointing a third of a step; a
        # higher stage or more accumulation only messages.
        def cost(options: MemoryOptions) -> tuple:
            return (options.offload != before.offload, len(options.changes(before)),
                    options.checkpointing, options.stage, options.accumulation)

        combinations = itertools.product(stages, accumulations, checkpointing, offloads)
        options = [MemoryOptions(*combination) for combination in combinations]
        return iter(sorted((one for one in options if one != before), key=cost))


def least_memory(memory: RankMemory, activations: Activations) -> int:
    """Bytes below which a process certainly fails: those `certain`, and half of the activations."""
    # half, since an allocator may do better than the estimate: no run that could fit is refused
    alive, _ = activations.worst()
    return memory.certain + alive // 2


def refuse_what_cannot_fit(plan: Plan, group: Processes) -> None:
    """UserError, before anything is allocated, when this process's device cannot hold the run.

    On a CPU all processes of a machine share its memory. UserError too for a disk without room for
    a checkpoint and the export.
    """
    checkpoint = checkpoint_bytes(plan, plan.config.deepspeed.zero_stage)
    check_run_dir(plan.config.run_dir, need_bytes=checkpoint + plan.copy)

    available = available_memory(group.device)
    if available is None:  # the system does not say: let the run try
        return

    cuda = group.device.type == "cuda"
    sharing = 1 if cuda else processes_here()  # each process has a GPU of its own
    fit = MemoryFit(plan, group.world_size, cuda)
    options = MemoryOptions.of(plan.config)
    memory = fit.memory(options)
    assert memory is not None, "a config that was read is possible"

    micro_batch = plan.config.train.batch_size // (group.world_size * options.accumulation)
    needed = least_memory(memory, fit.activations(micro_batch, options.checkpointing))
    if needed * sharing <= available:
        return
    each = f" for each of {sharing} processes" if sharing > 1 else ""
    shared = " for all of them" if sharing > 1 else ""
    raise UserError(f"this run of {plan.parameters:,} parameters needs more than {human(needed)} "
                    f"of memory{each}, and {human(available)} are there{shared}; "
                    f"{fit.remedy(available // sharing)}; see `tokenloom estimate --config`")
