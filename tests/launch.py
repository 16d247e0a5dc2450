"""Commands carried out in processes of their own that are forked from one in which all is imported already."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PRELOADED = ["launch", "veneer.cli.app", "veneer.cli.loading", "veneer.train.run", "veneer.recipe.adapter"]


def forked(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str], *, slow: bool
) -> multiprocessing.Process:
    """``veneer ARGUMENTS`` as a process whose output goes into a file. ``slow``: it waits in every micro-batch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_command, args=(list(arguments), str(log), dict(environment), slow))
    process.start()
    return process


def _command(arguments: list[str], log: str, environment: dict[str, str], slow: bool) -> None:
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    import torch

    from veneer.cli.app import app

    torch.set_num_threads(1)
    if slow:
        _slow_down()
    app(arguments)


def _slow_down() -> None:
    from veneer.train.progress import Progress

    counted = Progress.add_tokens

    def slowly(self: Progress, *counts: int) -> None:
        time.sleep(0.1)
        counted(self, *counts)

    Progress.add_tokens = slowly  # type: ignore[method-assign]
