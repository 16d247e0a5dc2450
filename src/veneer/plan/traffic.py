"""Bytes that processes send one another in an optimizer step: blocks of a sharded base, and the gradients."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.plan.memory_trace import BASE, GRADIENTS, NORMS
from veneer.plan.plan import Plan

PASSES = 2
"""A block is gathered once forward and once backward, whatever is recomputed."""


@dataclass(frozen=True, slots=True)
class GroupTraffic:
    """Bytes of one optimizer step: of the blocks that are gathered whole, and of the gradients that are summed."""

    gathered: int
    summed: int
    n_processes: int
    shard: int

    @property
    def gathers(self) -> int:
        """Bytes of other processes' parts of blocks that a process receives; its own part it has already."""
        return self.gathered * (self.shard - 1) // self.shard

    @property
    def gradients(self) -> int:
        """Bytes of gradients that a process receives, in a ring: parts to be summed, then parts of the sum."""
        return 2 * self.summed * (self.n_processes - 1) // self.n_processes

    @property
    def received(self) -> int:
        """Return all bytes that a process receives, as many as it sends."""
        return self.gathers + self.gradients


def traffic_of(plan: Plan, n_processes: int, shard: int) -> GroupTraffic:
    """Return the traffic of a step of ``n_processes``, of which ``shard`` share one copy of the base."""
    n_batches = plan.recipe.training_config().gradient_accumulation_steps
    gathered = PASSES * n_batches * block_bytes(plan) if shard > 1 else 0
    return GroupTraffic(gathered, plan.phases["optimizer"].kinds.get(GRADIENTS, 0), n_processes, shard)


def block_bytes(plan: Plan) -> int:
    """Return the bytes of the frozen weights of all blocks."""
    return sum(plan.held.kinds.get(kind, 0) for kind in (BASE, NORMS))
