"""Reads a block's own code: what it does with its halves besides adding them to the residual stream."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Hashable
from types import CodeType, FunctionType
from typing import Any, cast

from torch import nn

from veneer.model.inplace import plain_class

NAMED = ("silu", "relu")  # functions of torch that have one form


def odd_in_forward(block: nn.Module) -> str | None:
    """Return, in words, what a block's forward does beyond its description, or None if it does nothing more.

    The sign of more is a call of a function that is defined in the model's own file or imported there, such as one that
    weights the halves.
    """
    return _odd(cast(Hashable, plain_class(type(block))))


def values_returned(block: nn.Module) -> int | None:
    """Return the number of values in the tuple that a block's forward returns, or None if it returns no tuple."""
    return _n_returned(cast(Hashable, plain_class(type(block))))


def hands_on(holder: nn.Module) -> str | None:
    """Return the name of a value, besides the residual stream, that each block returns and the next block receives.
    Return None if there is none.

    It is found in the forward of ``holder``, which calls the blocks: ``h, kept = layer(h, kept=kept)``.
    """
    return _handed_on(cast(Hashable, plain_class(type(holder))))


def globals_named(module: nn.Module) -> set[str]:
    """Return the names that the forward of a module reads, those of functions within it included."""
    forward: Any = inspect.unwrap(plain_class(type(module)).forward)
    inner = [const for const in forward.__code__.co_consts if isinstance(const, CodeType)]
    return {name for code in (forward.__code__, *inner) for name in code.co_names}


def names_in_order(module: nn.Module) -> tuple[str, ...]:
    """Return the names of functions and attributes in a module's forward, in the order of their first use."""
    forward: Any = inspect.unwrap(plain_class(type(module)).forward)
    return cast("tuple[str, ...]", forward.__code__.co_names)


def takes_hidden_states(module: nn.Module) -> bool:
    """Return True if a module's forward accepts the keyword ``hidden_states``."""
    parameters = inspect.signature(inspect.unwrap(plain_class(type(module)).forward)).parameters.values()
    return any(each.name == "hidden_states" or each.kind is each.VAR_KEYWORD for each in parameters)


def named_activation(module: nn.Module) -> str | None:
    """Return the activation that a module's forward calls by name, as in ``F.silu(x)``, or None if it calls none."""
    forward: Any = inspect.unwrap(plain_class(type(module)).forward)
    found = [kind for kind in NAMED if kind in forward.__code__.co_names]
    return found[0] if len(found) == 1 else None


@functools.cache
def _odd(kind: Hashable) -> str | None:
    forward = inspect.unwrap(cast(Any, kind).forward)
    called = [name for name in forward.__code__.co_names if isinstance(forward.__globals__.get(name), FunctionType)]
    return f"its forward calls {', '.join(called)}, which the model description does not cover" if called else None


@functools.cache
def _n_returned(kind: Hashable) -> int | None:
    """Return the length of the tuple in the last return statement of a class's forward, also if the statement names a
    variable. Return None if no tuple is found.
    """
    nodes = _nodes(kind)
    returned = max((n for n in nodes if isinstance(n, ast.Return)), key=lambda n: n.lineno, default=None)
    value = None if returned is None else returned.value
    if isinstance(value, ast.Name):
        given = [n.value for n in nodes if isinstance(n, ast.Assign) and _is_named(n.targets, value.id)]
        value = next((each for each in given if isinstance(each, ast.Tuple)), None)
    return len(value.elts) if isinstance(value, ast.Tuple) else None


def _is_named(targets: list[ast.expr], name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


@functools.cache
def _handed_on(kind: Hashable) -> str | None:
    for node in _nodes(kind):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Call):
            beside = [each.id for each in node.targets[0].elts[1:] if isinstance(each, ast.Name)]
            given = (*node.value.args, *(keyword.value for keyword in node.value.keywords))
            found = next((each.id for each in given if isinstance(each, ast.Name) and each.id in beside), None)
            if found is not None:
                return found
    return None


def _nodes(kind: Hashable) -> list[ast.AST]:
    """Return the syntax tree's nodes of a class's forward, or an empty list if its source is not available."""
    try:
        source = inspect.getsource(inspect.unwrap(cast(Any, kind).forward))
        return list(ast.walk(ast.parse(textwrap.dedent(source))))
    except (OSError, SyntaxError):
        return []
