"""Part ``distributed`` of a recipe: the same run with any number of processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from veneer.data.tasks import OF_REWARDS
from veneer.errors import ConfigError

PLANNED = ("auto", "ddp", "fsdp")  # strategies that a plan can count without the machines
GENERATING_METRICS = ("exact-match", "regex")
OF_DDP = ("ddp_find_unused_parameters", "ddp_broadcast_buffers")
CHECKPOINTING = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
ROWS_OF_A_PROCESS = 8  # ``per_device_train_batch_size`` of a recipe, if it names none
_GATHERS = "and a sharded base would be gathered for every token"


class DistributedPart(BaseModel):
    """Layout of a run over its processes: who has which rows, and which parts of the base."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    global_batch: int | None = Field(
        default=None,
        ge=1,
        description="rows of an optimizer step; gradient_accumulation_steps follows from the number of processes",
    )

    strategy: Literal["auto", "ddp", "fsdp", "hybrid"] = Field(
        default="ddp",
        description="a copy of the base in each process (ddp), its frozen blocks sharded over all processes (fsdp) or "
        "those of a machine (hybrid), or the first of ddp, hybrid and fsdp whose plan fits (auto)",
    )
    shard: int | None = Field(
        default=None, ge=1, description="instead of strategy: how many processes share one copy of the base"
    )

    def copy_sizes(self, n_processes: int, n_on_machine: int) -> list[int]:
        """Return how many processes may share one copy of the base: the numbers to try, in order."""
        if self.shard is not None:
            return [self.shard]
        sizes = {"ddp": 1, "hybrid": n_on_machine, "fsdp": n_processes}
        if self.strategy != "auto":
            return [sizes[self.strategy]]
        return sorted(size for size in set(sizes.values()) if n_processes % size == 0)

    def copy_size(self, n_processes: int, n_on_machine: int) -> int:
        """Return the number of processes that share one copy of the base.

        Raises ConfigError if several numbers are possible (strategy auto), because then a plan of the run must choose
        first.
        """
        sizes = self.copy_sizes(n_processes, n_on_machine)
        if len(sizes) > 1:
            raise ConfigError(
                "distributed.strategy: auto chooses by the plan of a run, and this run has none (its base cannot be "
                "planned, or it was not started by veneer train). Say ddp, hybrid or fsdp."
            )
        return sizes[0]

    def with_copy_size(self, shard: int) -> DistributedPart:
        """Return the part for a run in which ``shard`` processes share each copy of the base."""
        return DistributedPart(global_batch=self.global_batch, shard=shard)

    def require_layout(self, n_processes: int, n_on_machine: int) -> None:
        """Raise ConfigError if ``n_processes`` cannot share the base by the keys ``shard`` and ``strategy``."""
        if self.shard is not None and n_processes % self.shard:
            fitting = [str(each) for each in range(1, n_processes + 1) if n_processes % each == 0]
            raise ConfigError(
                f"distributed.shard: {self.shard} must divide the {n_processes} processes of this run. Take one of "
                f"{', '.join(fitting)}, or start another number of processes."
            )
        if self.strategy == "hybrid" and n_processes == n_on_machine > 1:
            raise ConfigError(
                "distributed.strategy: hybrid on one machine is the same as fsdp, and machines with unequal "
                "numbers of tasks count as one. Say fsdp."
            )

    def accumulation(self, rows: int, n_processes: int) -> dict[str, int]:
        """Return ``gradient_accumulation_steps`` for ``training``, given micro-batches of ``rows`` in each process."""
        if self.global_batch is None:
            return {}
        return {"gradient_accumulation_steps": max(1, self.global_batch // (rows * n_processes))}


def dealing_problems(values: Mapping[str, Any], n_processes: int) -> list[str]:
    """Return the reasons why ``n_processes`` cannot share the global batch of a recipe's values."""
    wanted, training = _part(values, "distributed").get("global_batch"), _part(values, "training")
    rows = training.get("per_device_train_batch_size", ROWS_OF_A_PROCESS)
    if not (_is_count(wanted) and _is_count(rows)):
        return []  # it has none, or the types are wrong, which another check reports
    unit = rows * n_processes
    near = [str(each) for each in (wanted // unit * unit, (wanted // unit + 1) * unit) if each]
    found = [
        f"distributed.global_batch: {wanted} rows cannot be shared equally by {n_processes} processes "
        f"× per_device_train_batch_size {rows}: it must be a multiple of {unit}. Take {' or '.join(near)}."
    ] * bool(wanted % unit)
    for key in ("gradient_accumulation_steps", "auto_find_batch_size"):
        if training.get(key):
            found.append(
                f"training.{key}: the rows of a step are set by distributed.global_batch already ({wanted}). Leave one "
                "of the two out."
            )
    return found


def with_accumulation(values: Mapping[str, Any], n_processes: int) -> dict[str, Any]:
    """Return a recipe's values with the accumulation for ``n_processes`` in place of the global batch.

    With one process the global batch stays, so that a recipe written from the values keeps it.
    """
    part, training = dict(_part(values, "distributed")), _part(values, "training")
    if n_processes == 1 or part.pop("global_batch", None) is None:
        return dict(values)
    rows = training.get("per_device_train_batch_size", ROWS_OF_A_PROCESS)
    steps = DistributedPart.model_validate(_part(values, "distributed")).accumulation(rows, n_processes)
    return {**values, "distributed": part, "training": {**training, **steps}}


def layout_problems(values: Mapping[str, Any]) -> list[str]:
    """Return why the base cannot be sharded over processes, if the recipe's values ask for that."""
    given, training = _part(values, "distributed"), _part(values, "training")
    key = "shard" if "shard" in given else "strategy"
    if {"strategy", "shard"} <= given.keys():
        return ["distributed: strategy and shard both say how the base is shared. Leave one of the two out."]
    if given.get(key, "ddp") in ("ddp", 1):
        return []
    found = []
    if _part(values, "adapter").get("method") == "full":
        found.append("adapter.method: full trains every weight, and only frozen weights can be sharded")
    if values.get("task") in OF_REWARDS:
        found.append(f"task: {values['task']} generates text, {_GATHERS}")
    if _part(values, "metric").get("name") in GENERATING_METRICS:
        found.append(f"metric.name: {values['metric']['name']} generates text, {_GATHERS}: set it to 'labels'")
    for name in OF_DDP:
        if training.get(name):
            found.append(f"training.{name}: it is a setting of DDP, and has no effect on a sharded base")
    if training.get("activation_offloading"):
        found.append(
            "training.activation_offloading: it needs the memory of all weights before each forward pass, but a "
            "sharded base holds whole weights only while a block computes"
        )
    if any(_part(training, name).get("use_reentrant") for name in CHECKPOINTING):
        found.append(
            "training.gradient_checkpointing_kwargs: use_reentrant=True would gather each block's weights twice"
        )
    return [f"{each}. Leave it out, or distributed.{key}." for each in found]


def _part(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = values.get(name)
    return part if isinstance(part, dict) else {}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
