"""Tasks: adapters that hold a record for each of several tasks, of which every row of a batch names one."""

from __future__ import annotations

from veneer.errors import ConfigError


def unnamed_task(peft_type: str, n_tasks: int, on_disk: str = "") -> ConfigError:
    """Return the error for an adapter of several tasks whose record is needed while no task is named.

    ``on_disk``: what to do with a folder.
    """
    return ConfigError(
        f"{peft_type}: the adapter has {n_tasks} tasks, and rows name none: give task_ids, one number below {n_tasks} "
        f"for each row, or choose one for all with set_task(){on_disk}"
    )
