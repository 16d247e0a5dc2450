"""Stamp of a file: equal stamps mean that it is the same file, and that nobody has written to it since."""

from __future__ import annotations

import os


def stamp_of(told: os.stat_result) -> tuple[int, ...]:
    """Return the stamp of a file by its status.

    It has the time of the last change, too. A file that got the inode, size and date of one that is gone differs in it.
    """
    return told.st_dev, told.st_ino, told.st_mtime_ns, told.st_ctime_ns, told.st_size
