"""Plan of a run that is about to begin: one line, its facts for ``run.json``, and a check of the memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from veneer.errors import ConfigError, VeneerError
from veneer.model.memory.heap import trim
from veneer.plain.units import count, size
from veneer.plan.architecture import config_of
from veneer.plan.observed import remember
from veneer.plan.plan import as_json, batch_of, plan_recipe
from veneer.plan.planned_tasks import ROWS, length_key
from veneer.plan.processes import cut_over, first_that_fits
from veneer.plan.report import Machine, told
from veneer.plan.rows import filled
from veneer.recipe.recipe import Recipe

TOLD = (VeneerError, OSError, NotImplementedError)
"""Expected: what cannot be planned says so itself."""
# Unexpected, whether building an unusual model on tensors without values raises it or the planner is wrong; the two
# cannot be told apart. Neither may stop a run that would train, so the kind of the error is told for a report.
UNEXPECTED = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def planned_facts(
    recipe: Recipe,
    tell: Callable[[str], None],
    n_processes: int = 1,
    shards: Sequence[int] = (),
    *,
    timed: bool = True,
) -> tuple[dict[str, Any] | None, str]:
    """Return the facts of `veneer plan --json` for a recipe, and one line that sums them up. The facts are None if the
    recipe cannot be planned.

    ``shards``: possible numbers of processes, of ``n_processes``, that share one copy of the base; the facts have the
    bytes of each. ``tell`` is called with a line if float32 would be faster. Nothing is measured here. The facts have
    seconds if ``timed`` is True and measured rates or earlier runs are known.
    """
    try:
        machine = Machine.of_run(recipe.training_config(), timed=timed)
        config = config_of(recipe.model.source)
        full = batch_of(recipe, config)
        batch = full if n_processes > 1 else filled(full, recipe)  # the batches of several processes are filled up
        plan = plan_recipe(recipe, config=config, batch=batch, isa=machine.isa, n_processes=n_processes)
        note = machine.note(recipe.model, plan.config)
        if note is not None:
            tell(note)
        facts = as_json(plan) | machine.facts(plan, None)
        for shard in shards:
            cut = cut_over(plan, n_processes, shard)
            facts["process"].setdefault("shards", {})[str(shard)] = machine.bytes_of(cut)
    except (*TOLD, *UNEXPECTED) as error:
        reason, kind = str(error).strip().partition("\n")[0], type(error).__name__
        known = isinstance(error, TOLD) and reason
        return None, f"not planned: {reason}" if known else f"not planned: {kind}{': ' if reason else ''}{reason}"
    finally:
        trim()  # what the plan was traced with would lie beside the run
    return facts, told(plan, facts)


def with_shard(facts: Mapping[str, Any], sharing: int) -> dict[str, Any]:
    """Return the facts of a plan with one of its possible shards, and the bytes of a process with that shard.

    The shard is the first with which ``sharing`` processes fit into memory, or the last if none fits. If there are no
    shards, the facts are returned unchanged.
    """
    process = dict(facts["process"])
    shards = {int(shard): n_bytes for shard, n_bytes in process.pop("shards", {}).items()}
    if not shards:
        return dict(facts)
    chosen = first_that_fits(shards, process["free"], sharing) or next(reversed(shards))
    return {**facts, "process": {**process, "bytes": shards[chosen]}, "shard": chosen}


def require_room(facts: Mapping[str, Any], n_processes: int = 1) -> None:
    """Raise ConfigError if the ``n_processes`` of a run that share this memory need more than is available."""
    each, free = facts["process"]["bytes"], facts["process"]["free"]
    if n_processes * each > free:
        together = f"{size(n_processes * each)} in {n_processes} processes" if n_processes > 1 else size(each)
        raise ConfigError(
            f"this run is planned to take {together}, and {size(free)} may be taken here: {_advice(facts, free)}. "
            f"`veneer plan RECIPE --fit {free / n_processes / 1e9:.0f}GB` finds settings that fit, and --beyond-memory "
            "trains anyway"
        )


def _advice(facts: Mapping[str, Any], free: int) -> str:
    """Return the setting to change first if a plan needs more than ``free`` bytes.

    It is the storage of the weights if they alone do not fit, else the batch size if it is larger than usual, else the
    length of rows.
    """
    rows, length = facts["batch"]["rows"], facts["batch"]["length"]
    if facts["weights"]["bytes"] > free:
        return "set model.quantization to nf4" if facts["quantization"] == "none" else "take a smaller base"
    if rows > ROWS[facts["task"]]:
        return f"lower training.per_device_train_batch_size (planned are {rows:,} rows of {length:,} tokens)"
    return f"lower training.{length_key(facts['task'])} (planned is {count(rows, 'row')} of {length:,} tokens)"


def remember_run(facts: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Keep the seconds of a run's micro-batches for the plans of later runs on this processor."""
    found = record["results"].get("micro_batch")
    if found is not None and record["results"].get("device") == "cpu":
        remember(facts, found)
