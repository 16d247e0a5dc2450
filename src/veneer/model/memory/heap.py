"""Heap of glibc while a model trains on the CPU: freed memory stays with the process and is reused."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""Parameters of `mallopt`, as malloc.h numbers them: they are the process's, as is what follows."""
KEPT = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}
USUAL = {MMAP_MAX: 65536, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}
"""Values that glibc reaches by itself once a block of 32 MB was freed. After a call of `mallopt` it changes none
itself, so they are set at the end, whatever the environment (``MALLOC_*``) had said."""

MAPPED = {MMAP_MAX: 65536, MMAP_THRESHOLD: 128 << 10, TRIM_THRESHOLD: 128 << 10}
"""Thresholds with which glibc begins. Once they are set, no freed block moves them."""

_lock = Lock()
_n_within = _n_without = _n_mapped = _unused_before = 0


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Context in which freed memory stays with the process for later allocations; at its end it is returned to the
    system.

    By default glibc returns blocks above 32 MB at once, and free memory at the top of its heap too. A training step
    allocates the memory that the step before has freed, and the system first clears each new page. That takes a tenth
    of a step on the general path (logits), up to a quarter if a whole model is trained (gradients). Only blocks of the
    main thread are kept, until an allocation there fails: glibc keeps other threads' blocks in maps. The context is
    reentrant, and several threads may enter it. Other systems and allocators are left unchanged.
    """
    _change(within=1)
    try:
        yield
    finally:
        _change(within=-1)


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Enter a context in which a process that keeps freed memory returns all of it to the system, as is the default.

    It is for occasional work with blocks of other sizes, such as an evaluation. Those blocks do not fit into the memory
    that the steps have freed, and would be kept in addition.
    """
    _change(without=1)
    try:
        yield
    finally:
        _change(without=-1)


@contextmanager
def blocks_mapped() -> Iterator[None]:
    """Enter a context in which every allocation of 128 kB or more has a map of its own, which is removed when it is
    freed.

    The weights of a base that is sharded over processes are gathered a block at a time. Since weights are aligned,
    glibc finds no room for a block's weights where those of the block before were: a pass over 24 blocks in NF4 left
    3.6 times their bytes unused in its heap. This context has precedence over the others of this file.
    """
    _change(mapped=1)
    try:
        yield
    finally:
        _change(mapped=-1)


def kept_bytes() -> int:
    """Return the bytes freed within `freed_memory_kept` that are not in use again. The system counts them as in use."""
    with _lock:
        return max(0, _unused() - _unused_before) if _is_kept() else 0


def _change(within: int = 0, without: int = 0, mapped: int = 0) -> None:
    global _n_within, _n_without, _n_mapped, _unused_before
    with _lock:
        before = _wanted()
        _n_within, _n_without, _n_mapped = _n_within + within, _n_without + without, _n_mapped + mapped
        now = _wanted()
        if now is before:
            return
        if now is KEPT:
            _unused_before = _unused()
        _set(now)
        if now is not KEPT:
            trim()


def _wanted() -> Mapping[int, int]:
    if _n_mapped:
        return MAPPED
    return KEPT if _is_kept() else USUAL


def _is_kept() -> bool:
    return _n_within > 0 and _n_without == 0 and _n_mapped == 0


def trim() -> None:
    """Return freed memory to the system. This includes gaps between blocks in use, which glibc keeps by default."""
    _call("malloc_trim", ctypes.c_size_t(0))


def _set(parameters: Mapping[int, int]) -> None:
    for parameter, value in parameters.items():
        _call("mallopt", parameter, value)


class _MallocInfo(ctypes.Structure):
    """Struct ``mallinfo2`` of malloc.h.

    Only ``uordblks`` (bytes in use in the heap) and ``hblkhd`` (bytes of blocks that glibc maps by ``mmap``) are read.
    """

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def _unused() -> int:
    """Return the process's resident bytes that belong to no block in use.

    glibc's own count of free bytes is larger: pages that `trim` has returned to the system still count as free blocks.
    """
    function = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if function is None:
        return 0
    function.restype = _MallocInfo
    info = function()
    resident, shared = map(int, Path("/proc/self/statm").read_text(encoding="ascii").split()[1:3])
    return (resident - shared) * mmap.PAGESIZE - int(info.uordblks) - int(info.hblkhd)


def _call(name: str, *arguments: Any) -> None:
    """Call a function of glibc; do nothing with another C library."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)
