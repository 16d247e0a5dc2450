"""Tasks: adapters that hold a record for each of several tasks, of which every row of a batch names one."""

from __future__ import annotations

from veneer.errors import ConfigError


def unnamed_task(peft_type: str, n_tasks: int, on_disk: str = "") -> ConfigError:
    """Return the error for an adapter of several tasks, if a record is needed and no task is named.

    ``on_disk``: advice to append if the adapter is read from a folder.
    """
    return ConfigError(
        f"{peft_type}: the adapter has {n_tasks} tasks, and rows name none: give task_ids, one number below {n_tasks} "
        f"for each row, or choose one for all with set_task(){on_disk}"
    )
