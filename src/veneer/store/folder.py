"""Folders that are whole or absent: built under another name, flushed, and renamed into place."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from veneer.errors import ConfigError

_PARTIAL = ".partial-"


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A scratch folder beside ``target`` to write into; on leaving without an error it becomes ``target``.

    Raises ConfigError where the target exists and is not to be overwritten; then, and on any error, nothing changes.
    """
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists already; choose another folder or allow overwriting (--force)")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = _scratch(target)
    try:
        yield scratch
        _flush(scratch)
        _put_in_place(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def build_once(target: Path, is_whole: Callable[[Path], bool], build: Callable[[Path], None]) -> Path:
    """``target``, built by ``build(scratch)`` where it is not whole yet.

    Processes that race wait for the first and use its result. What a crashed one left behind is removed.
    """
    if is_whole(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{target.name}.lock"):
        if is_whole(target):
            return target
        for leftover in target.parent.glob(f".{target.name}{_PARTIAL}*"):
            shutil.rmtree(leftover)
        with new_folder(target, overwrite=True) as scratch:
            build(scratch)
    return target


def _scratch(target: Path) -> Path:
    folder = target.parent / f".{target.name}{_PARTIAL}{os.getpid()}-{secrets.token_hex(4)}"
    folder.mkdir()
    return folder


def _put_in_place(scratch: Path, target: Path) -> None:
    if target.is_dir():
        retired = _scratch(target)
        target.rename(retired / "old")
        scratch.rename(target)
        shutil.rmtree(retired)
    else:
        scratch.rename(target)
    _fsync(target.parent)


def _flush(folder: Path) -> None:
    """Everything on disk, and as readable as the folder is (safetensors makes its files private)."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(folder.stat().st_mode & 0o666)
            _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
