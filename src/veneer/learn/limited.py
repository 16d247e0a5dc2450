"""Calls of a user's functions, each on its own thread, so that one that hangs does not block the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any

from veneer.errors import TrainingError


def begun(function: Callable[..., Any], given: Mapping[str, Any]) -> Future[Any]:
    """Call a function with the keyword arguments ``given`` on a new thread, and return the future of its result.

    The thread does not keep the process alive.
    """
    told: Future[Any] = Future()
    told.set_running_or_notify_cancel()  # a thread cannot be cancelled

    def call() -> None:
        try:
            told.set_result(function(**given))
        except BaseException as error:  # noqa: BLE001 - SystemExit of a user's function too, which is told as any
            told.set_exception(error)

    threading.Thread(target=call, name=f"veneer-{getattr(function, '__name__', 'call')}", daemon=True).start()
    return told


class EndedError(BaseException):
    """Error for an asynchronous function that raised SystemExit or KeyboardInterrupt, which would end
    its event loop.
    """


async def awaited(function: Callable[..., Coroutine[Any, Any, Any]], given: Mapping[str, Any]) -> Any:
    """Run an asynchronous function with keyword arguments and return its result.

    Raises EndedError if it raises SystemExit or KeyboardInterrupt.
    """
    try:
        return await function(**given)
    except (SystemExit, KeyboardInterrupt) as error:
        raise EndedError from error


def result_within(told: Future[Any], seconds: float, name: str) -> Any:
    """Wait at most ``seconds`` for a result and return it.

    Raises TrainingError, with the function's ``name``, if the time is over or the function raised.
    """
    try:
        return told.result(timeout=seconds)
    except TimeoutError as error:
        if told.done():
            raise TrainingError(f"{name} raised {_told(error)}") from error
        raise TrainingError(hangs(name, seconds, "tool_timeout")) from error
    except KeyboardInterrupt:
        if not told.done():  # a user's own, in this thread
            raise
        raise TrainingError(f"{name} raised KeyboardInterrupt") from None
    except BaseException as error:
        raise TrainingError(f"{name} raised {_told(error)}") from error


def hangs(name: str, seconds: float, key: str) -> str:
    """Return the message for a function that did not return in time. ``key`` is the setting that limits it."""
    return (
        f"{name} did not return within {seconds:g} seconds, and is no longer waited for. Give it a limit of its own, "
        f"or set {key} higher"
    )


def left(until: float | None) -> float | None:
    """Return the seconds until ``until``, a time of `time.monotonic`: at least 0, or None if there is no limit."""
    return None if until is None else max(0.0, until - time.monotonic())


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
