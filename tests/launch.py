"""Programs and commands in processes of their own that are forked from one in which all is imported already.

A new interpreter takes several seconds to import torch, transformers and TRL; a fork takes none. Start an interpreter
where the test is about imports, about what is read from the environment at the start, or about how a program ends.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, repeat
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from operator import mul
from pathlib import Path

from patience import PATIENCE

PRELOADED = [
    "veneer.cli.app", "veneer.cli.train_run", "veneer.cli.serve", "veneer.recipe.adapter", "veneer.train.trainer",
    "veneer.train.preference.dpo", "veneer.learn.grpo", "veneer.train.preference.reward",
    "transformers.models.llama.modeling_llama", "datasets", "psutil", "prepared",
]  # fmt: skip


def forkserver() -> ForkServerContext:
    """Return the context whose processes have `PRELOADED` imported, a known machine, and no checks of shapes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = os.environ.get("PYTHONPATH")
    try:  # Python 3.11 looks in no other places for what is preloaded, and says nothing of what it does not find
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [before])])
        ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def forked(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str], *, slow: bool = False
) -> multiprocessing.Process:
    """Start ``veneer ARGUMENTS``, whose output goes into a file.

    ``slow``: it waits in every micro-batch, longer each time, so that it does not end before a test has seen it begin.
    """
    process = forkserver().Process(target=_command, args=(list(arguments), str(log), dict(environment), slow))
    process.start()
    return process


def started(code: str | Path, *arguments: object, stdout: Path, stderr: Path | None = None) -> multiprocessing.Process:
    """Start ``python -c CODE ARGUMENTS``, or a script, in the caller's environment; its output goes into files."""
    argv = ["-c" if isinstance(code, str) else str(code), *map(str, arguments)]
    streams = str(stdout), str(stderr or stdout)
    process = forkserver().Process(target=_program, args=(code, argv, dict(os.environ), *streams))
    process.start()
    return process


def together(target: Callable[..., None], folder: Path, n: int, *arguments: object) -> None:
    """Run ``target(folder, rank, n, *arguments)`` in ``n`` processes at once; AssertionError if one does not end well.

    A process may write what broke it into ``folder / "RANK.err"``.
    """
    context = forkserver()
    processes = [context.Process(target=target, args=(folder, rank, n, *arguments)) for rank in range(n)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    codes = [process.exitcode for process in processes]
    said = [path.read_text() for path in sorted(folder.glob("*.err"))]
    assert codes == [0] * n, f"exit codes {codes}, None: still running after {PATIENCE:g} s; {said}"


def program(code: str | Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run what `started` starts to its end. A program that takes longer than `PATIENCE` is killed."""
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        process = started(code, *arguments, stdout=stdout, stderr=stderr)
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess([str(code)], process.exitcode, stdout.read_text(), stderr.read_text())


def module(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``python -m NAME ARGUMENTS`` as `program` does."""
    return program(f"import runpy; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)", *arguments)


def _command(arguments: list[str], log: str, environment: dict[str, str], slow: bool) -> None:
    _require_preloaded()
    os.environ.update(environment)
    _write_into(log, log)
    import torch

    from veneer.cli.app import app

    torch.set_num_threads(1)
    if slow:
        _slow_down()
    app(arguments)


def _program(code: str | Path, argv: list[str], environment: dict[str, str], stdout: str, stderr: str) -> None:
    _require_preloaded()
    os.environ.clear()
    os.environ.update(environment)
    _write_into(stdout, stderr)
    sys.argv = argv
    if isinstance(code, Path):
        sys.path.insert(0, str(code.parent))
        runpy.run_path(str(code), run_name="__main__")
    else:
        exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})


def _require_preloaded() -> None:
    missing = [name for name in PRELOADED if name not in sys.modules]
    assert not missing, f"{missing} could not be imported into the process that is forked"


def _write_into(stdout: str, stderr: str) -> None:
    for stream, name in ((1, stdout), (2, stderr)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)


def _slow_down() -> None:
    from veneer.train.progress import Progress

    counted, seconds = Progress.add_tokens, accumulate(repeat(1.1), mul, initial=0.1)

    def slowly(self: Progress, *counts: int) -> None:
        time.sleep(next(seconds))
        counted(self, *counts)

    Progress.add_tokens = slowly  # type: ignore[method-assign]
