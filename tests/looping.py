"""Parameters whose values one case goes through: a case of its own for each would cost more than the values do.

``@pytest.mark.looped(names, values)`` is written as ``parametrize`` is. A failure names the values. On Triton's back
end, whose interpreter takes long, every combination stays a case, and is sampled (`sampling`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

EACH = object()
"""Stands for all values of a looped parameter."""


def parametrize(metafunc: Any, backends: Sequence[str] = ()) -> None:
    """Give a test its back ends, if it has some, and its looped parameters."""
    names = [name for mark in metafunc.definition.iter_markers("looped") for name in names_of(mark)]
    if not names:
        if backends:
            metafunc.parametrize("backend", backends, indirect=True)
    elif not backends:
        metafunc.parametrize(names, [[EACH] * len(names)], ids=["looped"])
    else:
        cases = [
            (backend, values) for backend in backends for values in _values_on(backend, metafunc.definition, names)
        ]
        given = [[backend, *values] for backend, values in cases]
        ids = ["-".join([backend, *map(str, values)]) if EACH not in values else backend for backend, values in cases]
        metafunc.parametrize(["backend", *names], given, ids=ids, indirect=["backend"])


def _values_on(backend: str, test: Any, names: list[str]) -> list[list[object]]:
    if backend != "triton":
        return [[EACH] * len(names)]
    return [[values[name] for name in names] for values in combinations(test)]


def run(item: Any) -> bool:
    """Run a case with each combination of its looped values. False, and no run, if it is no such case."""
    arguments = {name: item.funcargs[name] for name in item._fixtureinfo.argnames}
    if all(value is not EACH for value in arguments.values()):  # values may be arrays
        return False
    for values in combinations(item):
        try:
            item.obj(**arguments | values)
        except Exception as error:
            error.add_note("looped: " + ", ".join(f"{name}={value!r:.200}" for name, value in values.items()))
            raise
    return True


def combinations(item: Any) -> Iterator[dict[str, Any]]:
    """The combinations of a test's looped values, by the names of the parameters."""
    choices = [list(_choices(mark)) for mark in item.iter_markers("looped")]
    return ({name: value for part in parts for name, value in part.items()} for parts in itertools.product(*choices))


def _choices(mark: Any) -> Iterator[dict[str, Any]]:
    names = names_of(mark)
    for given in mark.args[1]:
        yield dict(zip(names, given if len(names) > 1 else (given,), strict=True))


def names_of(mark: Any) -> list[str]:
    """The names that a mark ``parametrize`` or ``looped`` gives."""
    names: str | Sequence[str] = mark.args[0]
    return names.replace(",", " ").split() if isinstance(names, str) else list(names)
