"""Bytes a rank if several processes train: a whole base in each (DDP), or blocks cut over all of them (FSDP)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from veneer.errors import ConfigError

# What needs torch is imported where it is used: a wrong option is told before seconds of imports.
if TYPE_CHECKING:
    from veneer.plan.live import Peak
    from veneer.plan.plan import Plan

STRATEGIES = ("ddp", "fsdp")
GATHERED, BUCKETS = "gathered weights", "gradient buckets"
BLOCKS = 3.6
"""Blocks that FSDP2 holds at once, measured (3.3 to 3.6): what is gathered, a copy of it, and the next block."""


def rank_peak(plan: Plan, n_processes: int, strategy: str) -> Peak:
    """Return the peak of one rank, each with a micro-batch of its own. Sharding may move the peak to another phase.

    Both keep the gradients a second time, while they are averaged. FSDP cuts the frozen weights of blocks and gathers
    one block at a time; whatever trains, embeddings and head stay whole (`model.sharding`). Raises ConfigError.
    """
    problems = []
    if n_processes < 1:
        problems.append(f"--processes {n_processes} must be at least 1")
    if strategy not in STRATEGIES:
        problems.append(f"--strategy {strategy!r} must be one of {', '.join(STRATEGIES)}")
    if problems:
        raise ConfigError("; ".join(problems))
    return max((_sharded(plan, phase, n_processes, strategy) for phase in plan.phases.values()), key=_bytes)


def _bytes(peak: Peak) -> int:
    return peak.n_bytes


def _sharded(plan: Plan, phase: Peak, n_processes: int, strategy: str) -> Peak:
    from veneer.plan.live import Peak  # it brings torch, which the options of `veneer plan` do without
    from veneer.plan.trace import BASE, NORMS

    kinds = {**phase.kinds, **({BUCKETS: 4 * plan.n_trained} if n_processes > 1 else {})}
    if strategy == "ddp" or n_processes == 1:
        return Peak(kinds)
    frozen = [kind for kind in (BASE, NORMS) if kind in kinds]
    block = sum(kinds[kind] for kind in frozen) / plan.config.get_text_config().num_hidden_layers
    return Peak({**kinds, **{kind: -(-kinds[kind] // n_processes) for kind in frozen}, GATHERED: round(BLOCKS * block)})
