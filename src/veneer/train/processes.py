"""The processes of one run: the main one decides and writes, the others wait for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed

from veneer.errors import TrainingError, VeneerError

T = TypeVar("T")


def n_processes() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if _together() else 1


def is_main() -> bool:
    """Whether this is the process that writes and prints; known before the processes have met, too."""
    return (distributed.get_rank() if _together() else int(os.environ.get("RANK", "0"))) == 0


def by_main(act: Callable[[], T]) -> T:
    """What ``act`` gives back in the main process, in all of them; the others wait.

    What it raises there is raised in all: a VeneerError as it is, anything else as a TrainingError in the others.
    """
    if n_processes() == 1:
        return act()
    if not is_main():
        value, error = _told(None)
        if error is not None:
            raise error
        return cast(T, value)
    try:
        value = act()
    except BaseException as error:
        passable = isinstance(error, VeneerError)
        _told((None, error if passable else TrainingError(f"the main process ended: {type(error).__name__}: {error}")))
        raise
    _told((value, None))
    return value


def summed(values: Tensor) -> Tensor:
    """The sum over the processes, on this one's device."""
    return _reduced(values, distributed.ReduceOp.SUM)


def largest(value: int, device: torch.device) -> int:
    """The largest of the processes' values."""
    if n_processes() == 1:
        return value
    return int(_reduced(torch.tensor(value, device=device), distributed.ReduceOp.MAX))


def gathered(value: T) -> list[T]:
    """The values of all processes in their order, in the main one; elsewhere nothing."""
    if n_processes() == 1:
        return [value]
    found: list[Any] | None = [None] * n_processes() if is_main() else None
    distributed.gather_object(value, found)
    return cast("list[T]", found or [])


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _told(outcome: tuple[Any, BaseException | None] | None) -> tuple[Any, BaseException | None]:
    box = [outcome]
    distributed.broadcast_object_list(box)
    return cast("tuple[Any, BaseException | None]", box[0])


def _reduced(values: Tensor, how: Any) -> Tensor:
    if n_processes() > 1:
        values = values.clone()
        distributed.all_reduce(values, how)
    return values
