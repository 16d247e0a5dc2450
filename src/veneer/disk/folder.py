"""Folders written all or nothing: built under another name, flushed, and renamed into place."""

from __future__ import annotations

import errno
import glob
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from veneer.errors import DiskError

log = logging.getLogger(__name__)

try:
    import fcntl
except ImportError:  # Windows locks no folders: what a crash leaves there stays
    fcntl = None  # type: ignore[assignment]

_PARTIAL = ".partial-"
_OLD = ".old"
_SETTLED_SECONDS = 2.0  # a scratch folder that is younger may not be locked yet


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder next to ``target``. Leaving the block without an error moves it to ``target``.

    On any error nothing changes. Leftovers of a killed process for the same target are removed first. If that process
    had moved an old ``target`` aside, it is restored. If ``target`` is a link, it stays a link, and the folder that it
    leads to is replaced.

    Raises DiskError if the disk is full or read-only or a file is in the way. Other failures raise OSError.
    """
    _make_parent(target)
    if target.is_symlink():
        target = target.resolve()
    _recover(target)
    scratch = target.parent / f".{target.name}{_PARTIAL}{os.getpid()}-{secrets.token_hex(4)}"
    scratch.mkdir()
    try:
        with _locked(scratch), disk_errors_told(target):
            yield scratch
            _flush(scratch)
            _put_in_place(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _make_parent(target: Path) -> None:
    """Create the folder that is to hold ``target``. Raises DiskError if a file or a broken link is in the way."""
    in_the_way = [p for p in (target, *target.parents) if (p.exists() or p.is_symlink()) and not p.is_dir()]
    if in_the_way:
        what = "a file" if in_the_way[-1].exists() else "a link to nowhere"
        raise DiskError(
            f"{target} cannot be made: {in_the_way[-1]} is {what}, not a folder. Choose another place, or move it."
        )
    target.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def disk_errors_told(target: Path) -> Iterator[None]:
    """Raise DiskError if the block fails because the disk is full or read-only, whatever the original error."""
    try:
        yield
    except DiskError:
        raise
    except BaseException as error:
        reason = _refusal(error)
        if reason is None:
            raise
        raise DiskError(
            f"{target} could not be written ({reason}). The earlier content is unchanged: make room or choose "
            "another disk, and run it again."
        ) from error


def _refusal(error: BaseException) -> str | None:
    """Return the reason why the disk refused; None for any other error. Rust and C++ libraries give it only as text."""
    text = str(error)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        words = os.strerror(code)
        if (isinstance(error, OSError) and error.errno == code) or f"(os error {code})" in text or words in text:
            return words
    return "the disk took only a part" if "PytorchStreamWriter failed writing" in text else None


def drop_leftovers(parent: Path, name: str) -> None:
    """Remove the unfinished folders that killed processes left in ``parent``. ``name`` is a pattern of target names."""
    for leftover in parent.glob(f".{name}{_PARTIAL}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def drop_folder(target: Path) -> None:
    """Remove a whole folder. It is renamed first, so that a crash leaves no partial folder under its name.

    A folder that cannot be removed (on a read-only disk, say) stays, with a warning.
    """
    scratch = target.with_name(f".{target.name}{_PARTIAL}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        target.rename(scratch)
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("%s cannot be removed and stays: %s", target, error)
        return
    shutil.rmtree(scratch, ignore_errors=True)


def _recover(target: Path) -> None:
    """Undo the unfinished work of killed processes on ``target``: restore its old folder, and remove their partial
    folders.

    A folder is left alone while the process that writes it lives, which shows by its lock.
    """
    leftovers = sorted(target.parent.glob(f".{glob.escape(target.name)}{_PARTIAL}*"))
    for old in (path for path in leftovers if path.suffix == _OLD):
        owner = old.with_suffix("")
        if not target.exists() and owner.exists() and _is_abandoned(owner):
            old.rename(target)
    for leftover in leftovers:
        owner = leftover.with_suffix("") if leftover.suffix == _OLD else leftover
        if not owner.exists() or _is_abandoned(owner):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_abandoned(scratch: Path) -> bool:
    try:
        if time.time() - scratch.stat().st_mtime < _SETTLED_SECONDS:
            return False
        with _locked(scratch) as mine:
            return mine
    except FileNotFoundError:  # its process put it in place meanwhile
        return False


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a lock that ends with the process.

    Yield False if another process holds it or the file system has no locks.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def build_once(
    target: Path,
    is_whole: Callable[[Path], bool],
    build: Callable[[Path], None],
    on_wait: Callable[[], None] = lambda: None,
) -> Path:
    """Return ``target``, built by ``build(scratch)`` if it is not complete yet.

    Concurrent processes wait for the first, after ``on_wait()``, and use its result. Leftovers of a crashed one are
    removed.
    """
    if is_whole(target):
        return target
    _make_parent(target)
    with _turn(FileLock(target.parent / f".{target.name}.lock"), on_wait):
        if is_whole(target):
            return target
        drop_leftovers(target.parent, target.name)
        with new_folder(target) as scratch:
            build(scratch)
    return target


@contextmanager
def _turn(lock: FileLock, on_wait: Callable[[], None]) -> Iterator[None]:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        on_wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _put_in_place(scratch: Path, target: Path) -> None:
    """Move ``scratch`` to ``target``. An old folder there is moved aside first, and removed afterwards; if the move
    fails, it is restored.
    """
    retired = scratch.with_name(f"{scratch.name}{_OLD}") if target.exists() else None
    if retired is not None:
        target.rename(retired)
    try:
        scratch.rename(target)
    except OSError:
        if retired is not None:
            retired.rename(target)
        raise
    _fsync(target.parent)
    if retired is not None:
        shutil.rmtree(retired, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Sync all files to disk. First give them the permissions of the folder, because safetensors makes its files
    private.
    """
    mode = folder.stat().st_mode & 0o666
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            path.chmod(mode)
        _fsync(path)


def _fsync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":  # other systems open no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
