"""Whether a training fits into memory, and the smallest change with which it does.

The estimate of the largest moment is good to a few per cent, but an allocator may do better or worse, so a training is refused
only for what no moment is without: parameters, their float32 copies and moments, gradients, and half of a micro-batch's
activations. All of it is shapes: it takes a fraction of a second for a small model and a few for the largest, against the
minutes or hours after which a run that cannot fit would be killed without a word.
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
from training.planning.activations import Activations
from training.planning.plan import Plan, RankMemory, layout_of, rank_memory

MOST_GPUS = 4096


class Change(NamedTuple):
    """How a config is run; `keys` names what differs from another."""

    stage: int
    accumulation: int
    checkpointing: bool
    offload: str

    @classmethod
    def none(cls, config: RunConfig) -> Change:
        """As the config says."""
        return cls(config.deepspeed.zero_stage, config.train.accumulation, config.train.gradient_checkpointing,
                   config.deepspeed.offload)

    def keys(self, before: Change) -> list[str]:
        """`key value` of what to set."""
        names = ("deepspeed.zero_stage", "train.accumulation", "train.gradient_checkpointing", "deepspeed.offload")
        return [f"{name} {str(new).lower()}" for name, new, old in zip(names, self, before, strict=True) if new != old]

    def changed(self, plan: Plan) -> Plan | None:
        """The plan with it; None where the config refuses such a combination."""
        values = plan.config.plain()
        values["deepspeed"] |= {"zero_stage": self.stage, "offload": self.offload}
        values["train"] |= {"accumulation": self.accumulation, "gradient_checkpointing": self.checkpointing}
        try:
            config = type(plan.config).parse(values, "plan")
        except UserError:
            return None
        return replace(plan, config=config)


class Fitting:
    """A plan on `processes` of one kind, as it is and with changes."""

    def __init__(self, plan: Plan, processes: int, cuda: bool) -> None:
        self.plan, self.processes, self.cuda = plan, processes, cuda
        self._known: dict[tuple[int, bool], Activations] = {}

    def activations(self, count: int, checkpointing: bool) -> Activations:
        """Of `count` pictures: looked at for one and two pictures and for the plan's own count, a straight line elsewhere."""
        if (count, checkpointing) not in self._known:
            own = self.plan.config.train.batch_size // (self.processes * self.plan.config.train.accumulation)
            if count in (1, 2, own):
                self._known[count, checkpointing] = self.plan.activations(count, checkpointing, self.cuda)
            else:
                one, two = self.activations(1, checkpointing), self.activations(2, checkpointing)
                self._known[count, checkpointing] = one.towards(two, count - 1)
        return self._known[count, checkpointing]

    def memory(self, change: Change, processes: int | None = None) -> RankMemory | None:
        """What a process needs; None where that combination is refused. UserError for a batch that cannot be divided."""
        plan, count = change.changed(self.plan), processes or self.processes
        if plan is None:
            return None
        layout = layout_of(plan, change.stage, count, self.cuda)
        micro = plan.config.train.batch_size // (count * change.accumulation)
        return rank_memory(plan, layout, self.activations(micro, change.checkpointing))

    def remedy(self, memory: int) -> str:
        """The fewest changes with which a process needs no more than `memory`, as a sentence."""
        before = Change.none(self.plan.config)
        change = self.smallest_change(memory)
        if change is not None:
            return f"it would fit with {', '.join(change.keys(before))}"
        count = 2 * self.processes
        while count <= MOST_GPUS and self.plan.config.train.batch_size % (count * before.accumulation) == 0:
            for change in (before, *self._changes(before, count)):
                if self._fits(change, memory, count):
                    return f"it would fit on {count} processes" + "".join(f", {key}" for key in change.keys(before))
            count *= 2
        return "no ZeRO stage, accumulation or gradient checkpointing makes it fit; use a smaller model or more memory"

    def smallest_change(self, memory: int) -> Change | None:
        """The plan as it is, or the first change with which it fits on as many processes."""
        before = Change.none(self.plan.config)
        changes = itertools.chain([before], self._changes(before, self.processes))
        return next((change for change in changes if self._fits(change, memory, self.processes)), None)

    def _fits(self, change: Change, memory: int, processes: int) -> bool:
        found = self.memory(change, processes)
        return found is not None and found.total <= memory

    def _changes(self, before: Change, processes: int) -> Iterator[Change]:
        """All that cost no result, the fewest and cheapest first."""
        micro = self.plan.config.train.batch_size // (processes * before.accumulation)
        accumulations = [before.accumulation * parts for parts in range(1, micro + 1) if micro % parts == 0]
        if isinstance(self.plan.config, MatcherRunConfig):  # fewer pictures at a time are fewer captions to tell one from
            accumulations = accumulations[:1]
        checkpointing = sorted({before.checkpointing, True})
        offloads = [before.offload, *(["optimizer"] if self.cuda and before.offload == "none" else [])]
        every = itertools.product(range(before.stage, 4), accumulations, checkpointing, offloads)
        changes = [Change(*values) for values in every if Change(*values) != before]
        return iter(sorted(changes, key=lambda change: (change.offload != before.offload, len(change.keys(before)),
                                                        change.checkpointing, change.stage, change.accumulation)))


def least_memory(memory: RankMemory, activations: Activations) -> int:
    """Bytes below which a process certainly fails: what is `certain`, and half of the activations."""
    return memory.certain + activations.worst()[0] // 2


def refuse_what_cannot_fit(plan: Plan, group: Processes) -> None:
    """UserError, before anything is made, when the memory of this process's device cannot hold the training. On a CPU all
    processes of a machine share it."""
    device = group.device
    available = available_memory(device)
    if available is None:
        return
    cuda = device.type == "cuda"
    sharing = 1 if cuda else processes_here()
    fitting, change = Fitting(plan, group.world_size, cuda), Change.none(plan.config)
    memory = fitting.memory(change)
    assert memory is not None, "a config that was read is possible"
    micro = plan.config.train.batch_size // (group.world_size * change.accumulation)
    needed = least_memory(memory, fitting.activations(micro, change.checkpointing))
    if needed * sharing <= available:
        return
    shared = f" for each of {sharing} processes" if sharing > 1 else ""
    raise UserError(f"this training of {plan.parameters:,} parameters needs more than {human(needed)} of memory{shared}, and "
                    f"{human(available)} are there{' for all of them' if sharing > 1 else ''}; "
                    f"{fitting.remedy(available // sharing)}; see `tokenloom estimate --config`")
