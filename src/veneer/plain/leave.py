"""End of a command without tearing down its modules: exit hooks run and output is flushed as usual.

Otherwise the interpreter would free every object of torch, transformers and other libraries one by one: 2 s of
computing after the last line, for memory that the system takes back at once.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def left_at_once() -> Iterator[None]:
    """End the process at once if the block raises SystemExit with an integer code or none; hooks of atexit run, and
    output is flushed.

    If other threads must end first, or if output cannot be written, the interpreter ends in its usual way.
    """
    try:
        yield
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            _leave(leaving.code or 0)
        raise


def _leave(code: int) -> None:
    others = (thread for thread in threading.enumerate() if thread is not threading.main_thread())
    if not all(thread.daemon for thread in others):
        return
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # closed before the process began
                stream.flush()
    except (OSError, ValueError):  # full, or closed
        return
    os._exit(code)
