"""Number of members of a sweep that fit into one worker's memory."""

from __future__ import annotations

from collections.abc import Sequence

from veneer.model.memory.available import available_bytes
from veneer.plan.before import TOLD, UNEXPECTED
from veneer.plan.draw import ENGINE
from veneer.plan.memory_trace import BASE, EMBEDDINGS, HEAD, NORMS
from veneer.plan.plan import Plan, plan_recipe
from veneer.plan.report import FRAGMENTS
from veneer.train.sweep.recipe import Member

_SHARED = (BASE, EMBEDDINGS, HEAD, NORMS, ENGINE)  # members that draw have one engine


def n_places(members: Sequence[Member], n_sharing: int) -> tuple[int, str]:
    """Return the number of members that fit into this process's memory, at least 1, and a line of text that reports it.

    Every member counts as much as the largest one. ``n_sharing``: number of workers that share a host's memory. If the
    memory cannot be planned, the number is 1.
    """
    largest = max(members, key=_size)
    args = largest.recipe.training_config()
    on_gpu = args.device.type == "cuda"
    free = available_bytes(args.device) // (1 if on_gpu else n_sharing)
    try:
        plan = plan_recipe(largest.recipe, isa="avx512_bf16" if on_gpu else None)
    except (*TOLD, *UNEXPECTED) as error:
        return 1, f"not planned, so members train one by one: {type(error).__name__}: {error}"
    n = places_of(plan, free)
    return n, f"a worker has memory for {n} members of the size of {largest.name}"


def places_of(plan: Plan, free: int) -> int:
    """Return the number of members like the plan's that fit into ``free`` bytes with one shared base; at least 1."""
    whole = round(plan.peak.n_bytes * FRAGMENTS)
    own = round(sum(n for kind, n in plan.peak.kinds.items() if kind not in _SHARED) * FRAGMENTS)
    return max(1, 1 + (free - whole) // max(own, 1))


def _size(member: Member) -> tuple[int, int]:
    args = member.recipe.training_config()
    length = getattr(args, "max_length", None) or getattr(args, "max_completion_length", 0)
    return args.per_device_train_batch_size * length, int(member.recipe.adapter.get("r") or 0)
