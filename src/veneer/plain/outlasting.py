"""Standard output and error of long work, which outlast the pipe or terminal that reads them."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_GONE = (errno.EPIPE, errno.EIO)  # of a pipe without a reader, and of a terminal that was closed


@contextmanager
def outlasting_readers() -> Iterator[None]:
    """Enter a context in which lines that nobody reads any longer are dropped.

    Python would raise BrokenPipeError instead, so that ``| head`` or the end of a ``tee`` would end the work. Streams
    that are not the process's own output or error stay as they are.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_outlasting(stream, number) for number, stream in enumerate(before, start=1))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _outlasting(stream: TextIO, number: int) -> TextIO:
    try:
        own = stream.fileno() == number
    except (AttributeError, OSError, ValueError):
        own = False
    if not own:
        return stream
    stream.flush()
    raw = io.BufferedWriter(_Output(number, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding=stream.encoding, errors=stream.errors, line_buffering=True)


class _Output(io.FileIO):
    """File of a descriptor that leads nowhere from the first write without a reader on."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return super().write(data)
