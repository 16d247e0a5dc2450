"""Large files written piece by piece: disk space is reserved before any work, and disk errors become DiskError."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from veneer.errors import DiskError
from veneer.plain.units import size

UNCHANGED = "Nothing was changed: make room or choose another disk, and run it again."


def reserve(file: FileIO, n_bytes: int) -> None:
    """Extend a file to ``n_bytes``, so that a full disk shows now. Raises OSError."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, n_bytes)
    else:
        file.truncate(n_bytes)


def write_at(file: FileIO, start: int, data: memoryview) -> None:
    """Write all bytes at an offset. Raises OSError."""
    file.seek(start)
    while data:
        data = data[file.write(data) :]


@contextmanager
def disk_errors_told(target: Path, n_bytes: int, left: Callable[[], str]) -> Iterator[None]:
    """Enter a context that turns a disk's error into DiskError while ``n_bytes`` are written to ``target``.

    ``left`` names the files left in place, and the next step.
    """
    try:
        yield
    except OSError as error:
        folder = next(path for path in target.parents if path.exists())
        raise DiskError(
            f"writing {size(n_bytes)} to {target} failed: {error.strerror or error} "
            f"({size(shutil.disk_usage(folder).free)} free). {left()}"
        ) from error
