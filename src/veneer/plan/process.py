"""A process beside its tensors: interpreter and libraries, scratch of kernels, what the allocator keeps."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.plan.machine import Rates, start_bytes
from veneer.plan.plan import Plan

ALLOCATOR_BYTES = 60_000_000
"""Scratch of kernels and heap that is kept but not used, beside live tensors (bench/plan.py; glibc)."""
ALLOCATOR_SHARE = 0.02


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
    before = len(rates.known)
    start = start_bytes(rates)
    if len(rates.known) != before:
        rates.save()
    moving = plan.peak.n_bytes - plan.held.n_bytes
    return Process(start, plan.peak.n_bytes, ALLOCATOR_BYTES + round(ALLOCATOR_SHARE * moving))
