"""Processes of one run: the main one decides and writes, and the others wait for it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast

import torch
from torch import distributed

from veneer.errors import ConfigError, Interrupted, LostProcessError, TrainingError, VeneerError
from veneer.plain.group import group_size

T = TypeVar("T")
_WORD = "veneer/ended"  # in the store that the processes share


def n_processes() -> int:
    """Return the number of processes that train together."""
    return distributed.get_world_size() if _together() else 1


def is_main() -> bool:
    """Return True in the process that writes and prints. This works before the processes have joined their group."""
    return (distributed.get_rank() if _together() else int(os.environ.get("RANK", "0"))) == 0


def meet(args: Any) -> None:
    """Join the process group that a launcher has started. ``args`` are a trainer's settings. A lone process does
    nothing.
    """
    if group_size() > 1:
        _ = args.device


def part() -> None:
    """Leave the process group, if there is one."""
    if _together():
        distributed.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """Enter a context that raises LostProcessError if another process of the run has ended.

    In the main process the error has the reason, if the other process could leave one. If a signal ended the other
    process, Interrupted is raised.
    """
    try:
        yield
    except BaseException as error:
        if n_processes() == 1:
            raise
        if _says_another_is_gone(error):
            raise _lost_process(error) from error
        if not is_main():
            _leave_word(error)
        raise


def _says_another_is_gone(error: BaseException) -> bool:
    """Return True if an error means that another process has ended. gloo has no exception class for such errors, so its
    source paths in the message are looked for.
    """
    lost = isinstance(error, distributed.DistError) or "/gloo/" in str(error)
    return isinstance(error, RuntimeError) and lost and not isinstance(error, VeneerError)


def _leave_word(error: BaseException) -> None:
    signal = error.number if isinstance(error, Interrupted) else None
    told = f"process {distributed.get_rank()} has ended: {str(error) or type(error).__name__}"
    with suppress(RuntimeError):  # the main process, which keeps what is said, is gone itself
        _store().compare_set(_WORD, "", json.dumps({"signal": signal, "told": told}))  # the first word stands


def _lost_process(error: BaseException) -> BaseException:
    with suppress(RuntimeError):
        if is_main() and _store().check([_WORD]):
            word = json.loads(_store().get(_WORD))
            return LostProcessError(word["told"]) if word["signal"] is None else Interrupted(word["signal"])
    return LostProcessError(
        "another process of this run has ended without a word (killed, out of memory, or its machine went down), or no "
        "longer answers. Checkpoints are kept: --resume goes on from the last one. Its last messages: "
        + _heard(str(error))
    )


def _heard(told: str) -> str:
    """Return the first line of the communication library's message, without gloo's source position and advice to
    developers.
    """
    line = told.strip().partition("\n")[0].partition(" This is typically caused by")[0]
    return re.sub(r"^\[[^\]]*/gloo/[^\]]*\]\s*", "", line)


def _store() -> Any:
    return distributed.distributed_c10d._get_default_store()


def by_main(act: Callable[[], T]) -> T:
    """Call ``act`` in the main process, and return its result in all processes.

    Its errors are raised in all processes: a VeneerError unchanged, any other as a TrainingError in the other
    processes.
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


def require_alike(run: Mapping[str, Any]) -> None:
    """Raise ConfigError in all processes if they are about to train different runs. ``run`` holds the facts of this
    process's run, as JSON values.
    """
    found = gathered(dict(run))

    def compare() -> None:
        for rank, each in enumerate(found):
            other = [key for key in run if each[key] != run[key]]
            if other:
                raise ConfigError(
                    f"process {rank} is about to train another run than process 0: {', '.join(other)} differ. Give all "
                    "processes the same recipe and the same files."
                )

    by_main(compare)


def summed(values: Sequence[float], device: torch.device) -> list[float]:
    """Return the sums of numbers over the processes."""
    if n_processes() == 1:
        return list(values)
    found = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(found, distributed.ReduceOp.SUM)
    return cast("list[float]", found.tolist())


def summed_in_place(values: torch.Tensor) -> None:
    """Replace a tensor, in every process, by its elementwise sum over the processes."""
    distributed.all_reduce(values, distributed.ReduceOp.SUM)


def largest(value: int, device: torch.device) -> int:
    """Return the largest ``value`` of all processes."""
    if n_processes() == 1:
        return value
    found = torch.tensor(value, device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return int(found)


def gathered(value: T) -> list[T]:
    """Return the values of all processes, ordered by rank, in the main process, and an empty list in the others."""
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
