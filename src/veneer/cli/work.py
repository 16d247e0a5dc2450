"""Verb of the program, made from its arguments. Its work imports torch, which takes seconds that help pages avoid."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable
from typing import Any

from veneer.plain.progress import waits_told


def verb(arguments: type, place: str | Callable[[Any], str], name: str) -> Callable[..., None]:
    """Return the verb with the fields of a dataclass as its arguments, and the help that is its docstring.

    The dataclass checks them as it is made. Then the function of this ``name`` in the module ``place`` is imported and
    takes it. The module may depend on the arguments.
    """

    def run(**given: Any) -> None:
        args = arguments(**given)
        with waits_told("loading torch and transformers"):
            work = importlib.import_module(place if isinstance(place, str) else place(args))
        getattr(work, name)(args)

    hints = typing.get_type_hints(arguments, include_extras=True)
    parameters = inspect.signature(arguments).parameters.values()
    run.__name__, run.__module__, run.__doc__ = name, arguments.__module__, arguments.__doc__
    run.__annotations__ = hints
    signature = inspect.Signature([each.replace(annotation=hints[each.name]) for each in parameters])
    vars(run)["__signature__"] = signature
    return run
