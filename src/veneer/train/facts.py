"""Facts of a run before it begins, in the form of ``run.json``."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from typing import Any

from veneer.plain.group import n_on_this_machine
from veneer.recipe.changes import places_of
from veneer.recipe.recipe import Recipe
from veneer.train.processes import n_processes
from veneer.train.record.going_on import files_of, parent_of
from veneer.train.record.record import this_process
from veneer.train.run_trainer import RunTrainer
from veneer.train.show.report import environment


def describe_run(recipe: Recipe, trainer: RunTrainer) -> dict[str, Any]:
    """Return the facts of a run before it begins."""
    config, values = recipe.adapter_config(), recipe.model_dump()
    return {
        "format": 1,
        "recipe": values,
        "places": places_of(values),
        "files": files_of(recipe.data),
        "process": this_process(),
        "n_processes": n_processes(),
        "shard": recipe.distributed.copy_size(n_processes(), n_on_this_machine()),
        "parent": parent_of(recipe.adapter),
        "adapter_config": asdict(config) if is_dataclass(config) else None,
        "training": trainer.args.to_dict(),
        "trained": trainer.describe(),
        "n_trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "data": {
            "train": trainer.describe_rows(trainer.train_dataset),
            "eval": None if trainer.eval_dataset is None else trainer.describe_rows(trainer.eval_dataset),
        },
        "environment": environment(),
    }
