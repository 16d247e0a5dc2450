"""A run over several processes in words: memory and traffic of a process by layout, and the layout that ``auto``
chooses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from veneer.plain.units import size
from veneer.plan.plan import Plan
from veneer.plan.processes import copy_sizes, cut_over, first_that_fits
from veneer.plan.report import Machine
from veneer.plan.traffic import traffic_of
from veneer.recipe.distributed_part import DistributedPart


@dataclass(frozen=True, slots=True)
class Ranks:
    """Number of processes of a plan, and the bytes a second that each receives; None if that is unknown."""

    n_processes: int
    bandwidth: float | None = None


def rank_facts(plan: Plan, machine: Machine, ranks: Ranks, seconds_a_batch: float | None) -> dict[str, Any]:
    """Return the memory and traffic of one process as plain numbers, for the recipe's layout and for each possible one.

    If the layout is ``auto``, its choice on one machine is reported. ``seconds_a_batch`` are those of a micro-batch.
    Raises ConfigError for a layout that depends on the machines, or does not fit the number of processes.
    """
    n, part = ranks.n_processes, plan.recipe.distributed
    wanted = copy_sizes(part, n)
    n_sharing = n if machine.card is None else 1  # processes that share this machine's memory and cores
    cut = {shard: cut_over(plan, n, shard) for shard in _divisors(n)}
    n_bytes = {shard: machine.bytes_of(each) for shard, each in cut.items()}
    free = machine.memory
    automatic = _automatic(n_bytes, free, n_sharing)
    shard = automatic["shard"] if len(wanted) > 1 else wanted[0]
    traffic, peak = traffic_of(plan, n, shard), cut[shard].peak
    seconds = {} if seconds_a_batch is None else {"computing": n_sharing * _n_batches(plan) * seconds_a_batch}
    if ranks.bandwidth is not None:
        seconds |= {"gathers": traffic.gathers / ranks.bandwidth, "gradients": traffic.gradients / ranks.bandwidth}
    return {
        "processes": n,
        "strategy": _named(shard, n),
        "shard": shard,
        "bytes": peak.n_bytes,
        "kinds": dict(peak.kinds),
        "process": n_bytes[shard],
        "traffic": {"gathers": traffic.gathers, "gradients": traffic.gradients, "received": traffic.received},
        **({"bandwidth": ranks.bandwidth} if ranks.bandwidth is not None else {}),
        **({"seconds": seconds} if seconds else {}),
        "layouts": [
            {
                "shard": each,
                "process": n_bytes[each],
                "received": traffic_of(plan, n, each).received,
                "fits": first_that_fits({each: n_bytes[each]}, free, n_sharing) is not None,
            }
            for each in cut
        ],
        "auto": automatic,
    }


def told_ranks(rank: Mapping[str, Any]) -> list[str]:
    """Return the facts of `rank_facts` as lines of text."""
    n, shard, sent = rank["processes"], rank["shard"], rank["traffic"]
    copies = "each with a whole base" if shard == 1 else f"{shard} share a copy of the base"
    gathered = f"{size(sent['gathers'])} of blocks, forward and backward, and " if shard > 1 else ""
    return [
        f"a rank of {n} ({rank['strategy']}, {copies}): process {size(rank['process'])}, {size(rank['bytes'])} of "
        "tensors",
        f"it receives {size(sent['received'])} a step: {gathered}{size(sent['gradients'])} of gradients"
        f"{_told_seconds(rank)}",
        f"auto takes {_named(rank['auto']['shard'], n)}: {rank['auto']['reason']}",
        *(
            f"shard {each['shard']}: process {size(each['process'])}{'' if each['fits'] else ' (does not fit)'}, "
            f"{size(each['received'])} received a step"
            for each in rank["layouts"]
        ),
    ]


def _told_seconds(rank: Mapping[str, Any]) -> str:
    seconds = rank.get("seconds", {})
    told = []
    if "gathers" in seconds:
        least = seconds["gathers"] + seconds["gradients"]
        told.append(f"{least:.3g} s at {rank['bandwidth'] / 1e9:g} GB/s")
    if "computing" in seconds:
        told.append(f"beside {seconds['computing']:.3g} s of computing")
    return f"; {' '.join(told)}" if told else ""


def _automatic(n_bytes: Mapping[int, int], free: int, n_sharing: int) -> dict[str, Any]:
    """Return the layout that ``auto`` chooses on one machine, with the reason, as plain numbers and text.

    ``n_bytes`` are the bytes of a process for each number of processes that share a copy of the base.
    """
    n = max(n_bytes)
    part = DistributedPart(strategy="auto")
    sizes = {shard: n_bytes[shard] for shard in part.copy_sizes(n, n)}
    room = f"{size(free)} may be taken" + (f" by {n_sharing} processes" if n_sharing > 1 else "")
    whole = f"a process with a whole base takes {size(n_bytes[1])}, and {room}"
    chosen = first_that_fits(sizes, free, n_sharing)
    if chosen == 1:
        return {"shard": 1, "reason": whole}
    least = first_that_fits(n_bytes, free, n_sharing)
    if chosen is None:
        return {"shard": n, "reason": f"{whole}; no layout fits"}
    hybrid = f". On machines of {least} devices or more, hybrid fits" if least is not None and least < n else ""
    return {"shard": chosen, "reason": f"{whole}{hybrid}"}


def _n_batches(plan: Plan) -> int:
    return int(plan.recipe.training_config().gradient_accumulation_steps)


def _divisors(n: int) -> list[int]:
    return [each for each in range(1, n + 1) if n % each == 0]


def _named(shard: int, n: int) -> str:
    return {1: "ddp", n: "fsdp"}.get(shard, "hybrid")
