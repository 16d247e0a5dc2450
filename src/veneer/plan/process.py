"""A process beside its tensors: interpreter and libraries, scratch of kernels, what the allocator keeps."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.plan.machine import Rates, start_bytes
from veneer.plan.plan import Plan
from veneer.plan.trace import GRADIENTS, STATE

ALLOCATOR_BYTES = 20_000_000
"""Scratch of kernels and heap that is kept but not used, beside live tensors (bench/plan.py; glibc)."""
MOVING_SHARE, TRAINED_SHARE = 0.02, 0.2
"""Of what comes and goes; and of gradients and optimizer state, between which freed memory does not fit again."""


@dataclass(frozen=True, slots=True)
class Process:
    """High water of a process that trains."""

    start: int
    tensors: int
    allocator: int

    @property
    def n_bytes(self) -> int:
        """All of it."""
        return self.start + self.tensors + self.allocator


def process_of(plan: Plan, rates: Rates) -> Process:
    """The process of a plan on this machine; the start of one is measured once and kept."""
    start = start_bytes(rates)
    moving = plan.peak.n_bytes - plan.held.n_bytes
    trained = sum(plan.peak.kinds.get(kind, 0) for kind in (GRADIENTS, STATE))
    lost = MOVING_SHARE * moving + (0.0 if _is_recomputed(plan) else TRAINED_SHARE * trained)
    return Process(start, plan.peak.n_bytes, ALLOCATOR_BYTES + round(lost))


def _is_recomputed(plan: Plan) -> bool:
    """True where blocks keep nothing but their inputs: next to nothing then lies among gradients and state."""
    args = plan.recipe.training_config()
    return bool(args.gradient_checkpointing) and not (args.gradient_checkpointing_kwargs or {}).get("selective")
