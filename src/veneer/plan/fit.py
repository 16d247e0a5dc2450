"""Settings of a recipe that fit a budget of memory, best first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from veneer.errors import ConfigError
from veneer.plain.progress import waiting_for
from veneer.plain.units import size
from veneer.plan.memory_trace import ACTIVATIONS, LOGITS, SCRATCH
from veneer.plan.plan import Plan, plan_recipe
from veneer.plan.planned_tasks import length_key
from veneer.plan.presets import hub_id_of
from veneer.recipe.distributed_part import DistributedPart
from veneer.recipe.optimizers import steps_in_backward
from veneer.recipe.parts import DataPart, ModelPart
from veneer.recipe.recipe import Recipe, changed

CHECKPOINTS = "gradient_checkpointing"
CHECKPOINTING: tuple[bool | str, ...] = (False, "selective", True)
FORMATS = ("none", "nf4")
SPARE = 0.05
"""Of what is planned, to be left free: plans are as exact as that (bench/training/plan.py and fit.py beside it)."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Settings that fit: the ``changes`` of the recipe, their plan, the bytes of the process, and the seconds a
    token."""

    changes: Mapping[str, Any]
    plan: Plan
    n_bytes: int
    seconds_a_token: float


Bytes = Callable[[Plan], int]
Cost = Callable[[Plan], float]


def fits(
    recipe: Recipe, config: PreTrainedConfig, budget: int, bytes_of: Bytes, cost: Cost, *, isa: str | None = None
) -> list[Fit]:
    """Return settings that fit ``budget`` bytes with `SPARE` of it left free, sorted by the seconds a token, least
    first.

    The settings vary the storage of the base, checkpointing, and the rows of a micro-batch. The rows of an optimizer
    step stay the same. ``bytes_of``, ``cost`` (seconds of a micro-batch) and ``isa`` are the machine's. Raises
    ConfigError if nothing fits, with a suggestion that would.
    """
    given, budget = budget, int(budget / (1 + SPARE))
    args = recipe.training_config()
    counts = _row_counts(args)
    found, least, ways = [], None, list(_ways(recipe.method, recipe.model, recipe.training))
    for number, changes in enumerate(ways, 1):
        waiting_for(f"planning: storage and checkpointing {number} of {len(ways)}")
        with_rows = changes | _rows(counts[0], args, recipe.distributed, recipe.data)
        one = plan_recipe(changed(recipe, with_rows), config=config, isa=isa)
        needed = bytes_of(one)
        if least is None or needed < least[0]:
            least = needed, changes, one
        if needed > budget:
            continue
        best = _largest(recipe, config, changes, one, budget=budget, bytes_of=bytes_of, isa=isa)
        found.append(Fit(best[0], best[1], bytes_of(best[1]), cost(best[1]) / best[1].n_tokens))
    if not found and least is not None:
        told = _missing(recipe, *least, budget)
        raise ConfigError(f"no settings fit {size(given)} with {SPARE:.0%} of it left free: {told}")
    return sorted(found, key=lambda fit: fit.seconds_a_token)


def _missing(recipe: Recipe, needed: int, changes: Mapping[str, Any], plan: Plan, budget: int) -> str:
    """Return the message for the case that nothing fits: the least bytes, the budget that would suffice, and the
    settings left to change.
    """
    args, weights = recipe.training_config(), plan.held.n_bytes
    told = ", ".join(f"{key}={value}" for key, value in changes.items()) or "the recipe as it is"
    kind = recipe.model.quantization
    knobs = [
        *(["an adapter in place of the whole model (adapter.method)"] if recipe.method == "full" else []),
        *(["model.quantization=nf4"] if kind not in FORMATS else []),
        *([f"a shorter training.{length_key(recipe.task)}"] if weights <= budget else []),
        "a smaller base",
    ]
    count = _row_counts(args)[0]
    rows = "one row" if count == 1 else f"{count} rows"
    alone = ", more than the budget by themselves" if weights > budget else ""
    beside = needed - plan.peak.n_bytes  # a process has it whatever its model
    missing = f"Missing: {' or '.join(knobs)}"
    if beside > budget:
        missing = f"Beside its tensors the process takes {size(beside)}, and so no base is small enough"
    enough = -(-int(needed * (1 + SPARE) + 1) // 10**7) * 10**7  # rounded up, as far as a size is told
    return (
        f"the least is {size(needed)} ({told}, {rows} of {plan.batch.length} tokens), {size(weights)} of it weights"
        f"{alone}. From {size(enough)} on it fits. {missing}"
    )


def loadable(recipe: Recipe) -> Recipe:
    """Return the recipe with a preset's name, which has no weights, replaced by its id on the hub."""
    hub_id = hub_id_of(recipe.model.source)
    return recipe if hub_id is None else changed(recipe, {"model.source": hub_id})


def _ways(method: str, model: ModelPart, training: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield choices of storage and checkpointing that the method allows, except those that the recipe has
    already made.
    """
    formats = FORMATS if method != "full" else ("none",)
    formats = formats if model.quantization == "none" else (model.quantization,)
    for kind, way in itertools.product(formats, CHECKPOINTING):
        yield {
            **({"model.quantization": kind} if kind != model.quantization else {}),
            **({f"training.{CHECKPOINTS}": way} if way != training.get(CHECKPOINTS, False) else {}),
        }


def _largest(
    recipe: Recipe,
    config: PreTrainedConfig,
    changes: Mapping[str, Any],
    one: Plan,
    *,
    budget: int,
    bytes_of: Bytes,
    isa: str | None,
) -> tuple[dict[str, Any], Plan]:
    """Find the largest micro-batch that fits and divides the rows of a step.

    Sizes are planned one by one, the largest first, since memory is not linear in the rows.
    """
    args = recipe.training_config()
    least, *more = _row_counts(args)
    for rows in reversed(more):
        settings = {**changes, **_rows(rows, args, recipe.distributed, recipe.data)}
        growing = sum(one.peak.kinds.get(kind, 0) for kind in (ACTIVATIONS, LOGITS, SCRATCH))
        if bytes_of(one) + (0.5 * rows - 1) * growing > budget and rows > 4:
            continue  # far too many: not worth a trace
        plan = plan_recipe(changed(recipe, settings), config=config, isa=isa)
        if bytes_of(plan) <= budget:
            return settings, plan
    return {**changes, **_rows(least, args, recipe.distributed, recipe.data)}, one


def _row_counts(args: Any) -> list[int]:
    """Return the allowed numbers of rows of a micro-batch: the divisors of the rows of a step.

    Only the full number is allowed if the optimizer steps in the backward pass, which excludes accumulation.
    """
    total = _rows_a_step(args)
    if steps_in_backward(args.optim):
        return [total]
    return [n for n in range(1, total + 1) if total % n == 0]


def _rows(rows: int, args: Any, distributed: DistributedPart, data: DataPart) -> dict[str, Any]:
    """Return settings with micro-batches of ``rows`` rows, and as many rows a step as before. Evaluation batches are
    limited to ``rows`` too.
    """
    changes = {"training.per_device_train_batch_size": rows}
    if distributed.global_batch is None:  # else it follows
        changes["training.gradient_accumulation_steps"] = _rows_a_step(args) // rows
    fewer = data.holds_out and rows < args.per_device_eval_batch_size
    return changes | ({"training.per_device_eval_batch_size": rows} if fewer else {})


def _rows_a_step(args: Any) -> int:
    return int(args.per_device_train_batch_size * args.gradient_accumulation_steps)
