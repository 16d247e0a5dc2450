"""Triton's interpreter, hostile: it finds what a GPU may do and the interpreter does not.

``order``: programs run last to first, and memory that nobody wrote holds NaN. ``behind`` and ``before``: the memory of
each tensor ends, or begins, at a page that cannot be read: a load or store out of bounds ends the process.

As a plug-in of pytest: ``PYTHONPATH=tests pytest -p hostile --hostile behind …``.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import pytest
import torch

WAYS = ("order", "behind", "before")
_NONE = 0  # PROT_NONE
_OPEN = pytest.StashKey[ExitStack]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--hostile", choices=WAYS, required=True)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_OPEN] = ExitStack()
    config.stash[_OPEN].enter_context(hostile(config.getoption("--hostile")))


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_OPEN].close()


@contextmanager
def hostile(way: str) -> Iterator[None]:
    """In this context the interpreter is hostile in one of `WAYS`."""
    with backwards() if way == "order" else fenced(way == "before"):
        yield


@contextmanager
def backwards() -> Iterator[None]:
    from triton.runtime.interpreter import InterpreterBuilder

    put = InterpreterBuilder.set_grid_idx

    def last_first(self: Any, *index: int) -> None:
        put(self, *(n - 1 - i for n, i in zip(self.grid_dim, index, strict=True)))

    before = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "set_grid_idx", last_first)
        torch.use_deterministic_algorithms(True, warn_only=True)  # torch then fills what is allocated
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


@contextmanager
def fenced(before: bool) -> Iterator[None]:
    """Tensors of a kernel are copied between two pages that cannot be read, to the end of one or before the other."""
    from triton.runtime import interpreter

    plain = interpreter.GridExecutor._init_args_hst

    def between_pages(self: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = plain(self, args, kwargs)
        known: dict[int, Any] = {}

        def moved(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            storage = x.untyped_storage()
            if storage.data_ptr() not in known:
                known[storage.data_ptr()] = _own_pages(storage, before)
            return x.new_empty(0).set_(known[storage.data_ptr()], x.storage_offset(), x.size(), x.stride())  # type: ignore[call-overload]

        return [moved(x) for x in args], {name: moved(x) for name, x in kwargs.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "_init_args_hst", between_pages)
        yield


def _own_pages(storage: Any, before: bool) -> Any:
    """A copy of a storage in pages of its own. They are freed with it."""
    size = storage.nbytes()
    if not size:
        return storage
    n_pages = -(-size // mmap.PAGESIZE)
    pages = mmap.mmap(-1, (n_pages + 2) * mmap.PAGESIZE)
    at = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for fence in (at, at + (n_pages + 1) * mmap.PAGESIZE):
        if protect(ctypes.c_void_p(fence), ctypes.c_size_t(mmap.PAGESIZE), _NONE):
            raise OSError(ctypes.get_errno(), "a page could not be closed")
    start = mmap.PAGESIZE if before else (n_pages + 1) * mmap.PAGESIZE - size
    return torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=start).untyped_storage().copy_(storage)
