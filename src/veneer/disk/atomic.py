"""Files written all or nothing: to disk under another name, then renamed into place."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from veneer.errors import DiskError


def write_atomically(path: Path, content: bytes, mode: int | None = None) -> None:
    """Replace a file's content. A crash or a full disk during the write leaves the old file unchanged.

    The file never has wider permissions than ``mode``, by default those that the umask leaves. Raises DiskError if the
    content cannot be written.
    """
    write_together(path.parent, {path.name: content}, mode)


def write_together(folder: Path, contents: Mapping[str, bytes], mode: int | None = None) -> None:
    """Write files into a folder, by name. All contents are on disk before the first file is renamed into place.

    ``mode`` are the permissions of the files, by default those that the umask leaves. If a content cannot be written,
    the old files are unchanged, and new folders are removed. Raises DiskError.
    """
    made = make_folder(folder)
    temporary: dict[str, Path] = {}
    name = ""
    try:
        for name, content in contents.items():
            temporary[name] = _beside(folder / name)
            _write_through(temporary[name], content, mode)
        for name, path in temporary.items():
            path.replace(folder / name)
    except BaseException as error:
        for path in (*temporary.values(), *made):
            with contextlib.suppress(OSError):
                path.rmdir() if path in made else path.unlink()
        if not isinstance(error, OSError):
            raise
        raise DiskError(
            f"{folder / name} could not be written ({error.strerror}). The earlier file is untouched: "
            "make room or choose another disk, and run it again"
        ) from error
    _sync_folder(folder)


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and its missing parents. Return the new ones, innermost first. Raises DiskError."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"{folder} cannot be made a folder: {error.strerror}. Choose another place") from error
    return made


def _beside(path: Path) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    return Path(name)


def _write_through(path: Path, content: bytes, mode: int | None) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o666 & ~_umask() if mode is None else mode)


def _umask() -> int:
    mask = os.umask(0o077)  # while it is read, other threads make files that are too closed, not too open
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that a rename in it survives a power cut. Do nothing if the system cannot."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
