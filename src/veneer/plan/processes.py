"""Bytes a rank if several processes train: copies of everything (DDP), or shards of it (FSDP).

ZeRO's count (Rajbhandari et al. 2020, arXiv:1910.02054) with frozen weights, which have neither gradient nor state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from veneer.errors import ConfigError

# What needs torch is imported where it is used: a wrong option is told before seconds of imports.
if TYPE_CHECKING:
    from veneer.plan.live import Peak
    from veneer.plan.plan import Plan

STRATEGIES = ("ddp", "fsdp")
GATHERED, BUCKETS = "gathered weights", "gradient buckets"


def rank_peak(plan: Plan, n_processes: int, strategy: str) -> Peak:
    """Return the peak of one rank, each with a micro-batch of its own. Sharding may move the peak to another phase.

    DDP keeps the gradients a second time, in the buckets that are reduced. FSDP keeps 1/N of weights (trained or
    frozen), gradients and optimizer state. It gathers one group at a time: a block (and the next one, prefetched), or
    embeddings and head. Raises ConfigError.
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
    from veneer.plan.trace import ADAPTERS, BASE, EMBEDDINGS, GRADIENTS, HEAD, NORMS, STATE, TRAINED

    kinds = dict(phase.kinds)
    if strategy == "ddp":
        return Peak({**kinds, **({BUCKETS: 4 * plan.n_trained} if n_processes > 1 else {})})
    n_blocks = plan.config.get_text_config().num_hidden_layers
    blocks = sum(kinds.get(kind, 0) for kind in (BASE, NORMS, TRAINED, ADAPTERS)) / n_blocks
    outside = kinds.get(EMBEDDINGS, 0) + kinds.get(HEAD, 0)
    cut = (BASE, EMBEDDINGS, HEAD, NORMS, TRAINED, ADAPTERS, GRADIENTS, STATE)
    sharded = {kind: -(-n // n_processes) if kind in cut else n for kind, n in kinds.items()}
    return Peak({**sharded, **({GATHERED: round(max(2 * blocks, outside))} if n_processes > 1 else {})})
