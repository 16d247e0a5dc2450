"""Reading of a block's own code: what it does with its halves beyond adding them to the stream."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Hashable
from types import FunctionType
from typing import Any, cast

from torch import nn

from veneer.model.inplace import plain_class

NAMED = ("silu", "relu")  # functions of torch that have one form


def odd_in_forward(block: nn.Module) -> str | None:
    """Return, in words, what a block's forward does beyond what its parts' description says; None if nothing.

    It may call a function of its module (which weighs the halves), or return a tuple.
    """
    return _odd(cast(Hashable, plain_class(type(block))))


def named_activation(module: nn.Module) -> str | None:
    """Return the activation that the forward of a module calls by name, as in ``F.silu(x)``; None without one."""
    forward: Any = inspect.unwrap(plain_class(type(module)).forward)
    found = [kind for kind in NAMED if kind in forward.__code__.co_names]
    return found[0] if len(found) == 1 else None


@functools.cache
def _odd(kind: Hashable) -> str | None:
    forward = inspect.unwrap(cast(Any, kind).forward)
    called = [name for name in forward.__code__.co_names if isinstance(forward.__globals__.get(name), FunctionType)]
    if called:
        return f"its forward calls {', '.join(called)}, which the description has no words for"
    return "its forward returns a tuple" if _returns_tuple(forward) else None


def _returns_tuple(forward: FunctionType) -> bool:
    """Return True if the last value that ``forward`` returns is a tuple, or a name bound to one."""
    try:
        nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(forward)))))
    except (OSError, SyntaxError):
        return False
    returned = max((n for n in nodes if isinstance(n, ast.Return)), key=lambda n: n.lineno, default=None)
    value = None if returned is None else returned.value
    if isinstance(value, ast.Name):
        given = [n.value for n in nodes if isinstance(n, ast.Assign) and _is_named(n.targets, value.id)]
        return any(isinstance(each, ast.Tuple) for each in given)
    return isinstance(value, ast.Tuple)


def _is_named(targets: list[ast.expr], name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)
