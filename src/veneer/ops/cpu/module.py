"""C++ module `veneer._kernels`, bound to torch's threads on first use."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch

from veneer.errors import OutdatedKernelsError
from veneer.ops.traced import silent_kernels
from veneer.plain.units import count

log = logging.getLogger(__name__)

# How csrc/core/numeric.h counts element types.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def kernels() -> Any:
    """Return the module `veneer._kernels`; while a step is traced, a stand-in for it that runs no kernel."""
    module = _loaded()
    return silent_kernels(module) or module


@cache
def _loaded() -> ModuleType:
    """Import the module. Its kernels run on the OpenMP runtime that torch has loaded: one pool of threads a process."""
    module = importlib.import_module("veneer._kernels")
    vars(module)["__getattr__"] = _lacking
    if not thread_runtime():
        log.warning("torch's OpenMP runtime was not found: veneer's CPU kernels run on one thread")
    return module


def _lacking(name: str) -> NoReturn:
    raise OutdatedKernelsError(
        f"veneer's compiled kernels lack {name}: they are older than its Python code. Build them again with `make "
        "setup`, or install veneer again."
    )


@cache
def thread_runtime() -> str:
    """Return the file of the OpenMP runtime that torch and the kernels share; empty if there is none."""
    module = importlib.import_module("veneer._kernels")
    folder = Path(torch.__file__).parent / "lib"
    found = (module.share_threads(str(folder / name)) for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"))
    return next((runtime for runtime in found if runtime), "")


def description() -> str:
    """Return one line: the instruction set in use, those that are built, and the threads of the kernels and
    their runtime.
    """
    runtime, module = thread_runtime(), kernels()
    threads = count(module.max_threads(), "thread")
    built = ", ".join(module.built_isas())
    return f"{module.isa()} (built: {built}), {threads} of {Path(runtime).name or 'its own (no OpenMP)'}"
