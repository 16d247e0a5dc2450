"""Memory of a process if several train: a whole base in each (ddp), or blocks sharded over some (hybrid) or all
(fsdp).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from veneer.errors import ConfigError
from veneer.plan.live_bytes import Peak
from veneer.plan.memory_trace import BASE, NORMS
from veneer.plan.plan import Plan
from veneer.recipe.distributed_part import PLANNED, DistributedPart

GATHERED, BUCKETS = "gathered weights", "gradient buckets"
BLOCKS = 3.6
"""Blocks that FSDP2 holds at once, measured (3.3 to 3.6): what is gathered, a copy of it, and the next block."""


def copy_sizes(part: DistributedPart, n_processes: int) -> list[int]:
    """Return possible numbers of processes, of ``n_processes`` on one machine, that share one copy of the base, in the
    order in which to try them.

    Raises ConfigError if the layout depends on the number of machines.
    """
    if part.shard is None and part.strategy not in PLANNED:
        raise ConfigError(
            f"distributed.strategy: {part.strategy} depends on the machines that train, which a plan does not know. "
            "Give --shard N, the devices of each machine."
        )
    part.require_layout(n_processes, n_processes)
    return part.copy_sizes(n_processes, n_processes)


def first_that_fits(bytes_of: Mapping[int, int], free: int, n_sharing: int) -> int | None:
    """Return the first size of ``bytes_of`` with which ``n_sharing`` processes fit into free memory; None if none does.

    ``bytes_of``: the bytes of one process for each number of processes that share a copy of the base.
    """
    return next((size for size, n_bytes in bytes_of.items() if max(1, n_sharing) * n_bytes <= free), None)


def cut_over(plan: Plan, n_processes: int, shard: int) -> Plan:
    """Return the plan of one of several processes, of which ``shard`` share one copy of the base.

    Each process holds the gradients twice while they are averaged. With ``shard`` above 1 the frozen weights of blocks
    are sharded, and one block at a time is gathered; trained weights, embeddings and head stay whole
    (`model.sharded.sharding`). A base is sharded while it is loaded, a block at a time. The peak may move to another
    phase.
    """
    phases = {phase: _cut(plan, peak, n_processes, shard) for phase, peak in plan.phases.items()}
    return replace(plan, phases=phases, held=_cut(plan, plan.held, n_processes, shard))


def _cut(plan: Plan, peak: Peak, n_processes: int, shard: int) -> Peak:
    kinds = {**peak.kinds, **({BUCKETS: 4 * plan.n_trained} if n_processes > 1 else {})}
    if shard == 1:
        return Peak(kinds)
    frozen = [kind for kind in (BASE, NORMS) if kind in kinds]
    block = sum(kinds[kind] for kind in frozen) / plan.config.get_text_config().num_hidden_layers
    return Peak({**kinds, **{kind: -(-kinds[kind] // shard) for kind in frozen}, GATHERED: round(BLOCKS * block)})
