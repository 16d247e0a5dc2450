"""Time limit for Python code that may never end, such as an untrusted adapter's chat template."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class _OutOfTime(BaseException):
    """Exception raised inside code that took too long. No handler in the program may catch it as an ordinary error."""


class _Alarm:
    """Alarm that raises _OutOfTime in the thread that created it, at most once and not after `off`."""

    def __init__(self) -> None:
        self._thread, self._lock, self._is_off = threading.get_ident(), threading.Lock(), False
        self.has_rung = False

    def ring(self) -> None:
        with self._lock:
            if not self._is_off:
                self.has_rung = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(_OutOfTime))

    def off(self) -> None:
        """Stop the alarm. An exception that is still on its way arrives here and is dropped.

        PyThreadState_SetAsyncExc(thread, NULL) would leave a flag set in CPython 3.11: each call of the process would
        look for an exception that never comes, and the first one under `sys.setprofile` would not end.
        """
        with self._lock:
            self._is_off = True
        if self.has_rung:
            for _ in range(2):  # a jump backward looks for exceptions of other threads
                pass


def within(seconds: float, action: Callable[[], T]) -> T:
    """Return the result of an action in this thread.

    Raises TimeoutError if it takes longer. The action is stopped between two Python instructions, but not within one
    long call of C.
    """
    alarm = _Alarm()
    timer = threading.Timer(seconds, alarm.ring)
    timer.daemon = True
    try:
        try:
            timer.start()
            result = action()
        finally:
            timer.cancel()
            alarm.off()
        if not alarm.has_rung:
            return result
    except _OutOfTime:
        pass
    raise TimeoutError(f"longer than {seconds:g} s")
