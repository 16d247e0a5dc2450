"""Command of the program, made from its arguments.

Its work imports torch, which takes seconds that help pages avoid.
"""

from __future__ import annotations

import importlib
import inspect
import signal
import threading
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

from veneer.errors import Interrupted
from veneer.plain.libraries import libraries_loading

_LEFT = "an unfinished output is removed, and existing files are unchanged"


def verb(arguments: type, place: str | Callable[[Any], str], name: str, *, hears: bool = True) -> Callable[..., None]:
    """Return the verb whose arguments are a dataclass's fields, and whose help is the dataclass's docstring.

    The verb creates the dataclass, which checks the arguments. It then imports the module ``place``, which may depend
    on the arguments, and calls its function ``name`` with the dataclass. If ``hears``, SIGTERM and Ctrl-C end the verb
    with a message that names the files left on disk.
    """

    def run(**given: Any) -> None:
        args = arguments(**given)
        with _ends_told() if hears else nullcontext():
            with libraries_loading():
                work = importlib.import_module(place if isinstance(place, str) else place(args))
            getattr(work, name)(args)

    hints = typing.get_type_hints(arguments, include_extras=True)
    parameters = inspect.signature(arguments).parameters.values()
    run.__name__, run.__module__, run.__doc__ = name, arguments.__module__, arguments.__doc__
    run.__annotations__ = hints
    signature = inspect.Signature([each.replace(annotation=hints[each.name]) for each in parameters])
    vars(run)["__signature__"] = signature
    return run


@contextmanager
def _ends_told() -> Iterator[None]:
    """Enter a context in which SIGTERM raises Interrupted; its message, and that of Ctrl-C, name the files left on
    disk.

    If SIGTERM is ignored, it stays ignored. Nothing changes in a thread other than the main one, where Python handles
    no signals.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number, f"{signal.Signals(number).name}: {_LEFT}")

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt as error:
        error.args = error.args or (_LEFT,)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
