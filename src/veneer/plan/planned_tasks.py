"""Tasks whose step is planned."""

from __future__ import annotations

from veneer.data.tasks import OF_REWARDS
from veneer.errors import ConfigError

ROWS = {"sft": 1, "dpo": 2, "kto": 1, "grpo": 1, "rloo": 1, "best_of": 1, "distill": 1}
"""The tasks that are planned, with the rows that a row of their data becomes in a batch."""
_NOT_PLANNED = {
    "reward": "a head of its own in place of the vocabulary's",
}


def length_key(task: str) -> str:
    """Return the training setting that bounds the length of a task's rows."""
    return "max_completion_length" if task in OF_REWARDS else "max_length"


def require_planned(task: str, method: str) -> None:
    """Raise ConfigError for a task whose step is not planned, with the reason and how to measure it instead."""
    if task in _NOT_PLANNED:
        found = f"because its step has {_NOT_PLANNED[task]}: planned are {', '.join(ROWS)}"
    elif task != "sft" and method == "full":
        task += " of a whole model"
        found = "because it keeps a copy of the model as reference: planned are adapters"
    else:
        return
    raise ConfigError(
        f"task {task} is not planned, {found}. A short run writes its memory and seconds to run.json: veneer train "
        "RECIPE --set training.max_steps=2 --set output=trial"
    )
