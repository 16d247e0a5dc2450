"""Time limit of Python code that may never end, such as the chat template of a stranger's adapter."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class _OutOfTime(BaseException):
    """Raised inside the code that took too long; nothing in it may take it for an error of its own."""


class _Alarm:
    """Raises _OutOfTime in the thread that made it, until it is off."""

    def __init__(self) -> None:
        self._thread, self._lock, self._is_off = threading.get_ident(), threading.Lock(), False

    def ring(self) -> None:
        with self._lock:
            if not self._is_off:
                self._raise(_OutOfTime)

    def off(self) -> None:
        """Stop it; an exception that has not arrived is taken back."""
        with self._lock:
            self._is_off = True
            self._raise(None)

    def _raise(self, error: type[BaseException] | None) -> None:
        given = ctypes.py_object() if error is None else ctypes.py_object(error)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), given)


def within(seconds: float, action: Callable[[], T]) -> T:
    """Return the result of an action in this thread.

    Raises TimeoutError if it takes longer. It is stopped between two instructions of Python, so not within one long
    call of C.
    """
    alarm = _Alarm()
    timer = threading.Timer(seconds, alarm.ring)
    timer.daemon = True
    try:
        try:
            timer.start()
            return action()
        finally:
            timer.cancel()
            alarm.off()
    except _OutOfTime:
        raise TimeoutError(f"longer than {seconds:g} s") from None
