"""Stamp of a file: equal stamps mean that it is the same file, and that nobody has written to it since."""

from __future__ import annotations

import os


def stamp_of(told: os.stat_result) -> tuple[int, ...]:
    """Return the stamp of a file, given its status.

    It includes the time of the last change: a new file may have the inode, size and date of an earlier one.
    """
    return told.st_dev, told.st_ino, told.st_mtime_ns, told.st_ctime_ns, told.st_size
