"""Type checks of a dataclass's fields, and the plain values that they keep.

``int`` is any whole number and ``float`` any finite one, numpy's too; neither is True or False. ``str`` is also a path.
``Collection`` is any sequence or set but a string, whose letters would count as its elements.
"""

from __future__ import annotations

import functools
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import MISSING, Field, fields
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from veneer.errors import ConfigError, VeneerError

_QUOTED = re.compile(r"""(?<!\w)(['"])(\\.|(?!\1)[^\\])*\1""")  # a value: what stands in it is no field's name
_EXACT = 2**53  # whole numbers up to here are floats too; torch computes with none beyond 64 bits
_ONE_AND_MANY = {
    int: ("a whole number", "whole numbers"),
    float: ("a finite number", "finite numbers"),
    str: ("a string", "strings"),
    object: ("anything", "anything"),
    type(None): ("None", "None"),
}


def check(config: Any, problems: Callable[[], list[str]], error: type[VeneerError] = ConfigError) -> None:
    """Convert the fields of a new dataclass to the types that `kept` returns, and raise ``error`` with all problems if
    there are any.

    ``problems`` returns further problems. While it runs, each field of a wrong type holds its default, so that every
    comparison is possible. Sentences of ``problems`` that name such a field are left out, because they may be about the
    default.
    """
    kind: type = type(config)
    hints, wrong = _hints(kind), dict[str, list[str]]()
    for spec in fields(config):
        value, hint = plain(getattr(config, spec.name)), hints[spec.name]
        if not fits(value, hint):
            wrong[spec.name] = misfits(spec.name, value, hint)
            value = _default(spec)
        object.__setattr__(config, spec.name, kept(value, hint) if fits(value, hint) else value)
    others = [said for said in problems() if not wrong.keys() & set(re.findall(r"\w+", _QUOTED.sub("", said)))]
    found = [*(said for each in wrong.values() for said in each), *others]
    if found:
        owner = getattr(kind, "given_to", "") or kind.__name__  # see `serve.schedule.keywords`
        raise error(f"{owner}: " + "; ".join(found))


def plain(value: Any) -> Any:
    """Return an array or a tensor as lists and numbers, and anything else unchanged."""
    return value.tolist() if hasattr(value, "tolist") else value


def fits(value: object, hint: Any) -> bool:
    """Return True if a field with the type hint ``hint`` may hold the value. A bool is no number, an int is also a
    float, and a float must be finite.
    """
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is Mapping:
        return isinstance(value, Mapping) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if origin in (Collection, tuple):
        return _is_list(value) and (_are(value, inner[0]) or all(fits(each, inner[0]) for each in value))  # type: ignore[attr-defined]
    if origin is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if origin is float:
        if isinstance(value, Integral) and fits(value, int):
            return abs(int(value)) <= sys.float_info.max
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, (str, os.PathLike) if origin is str else origin)


def kept(value: Any, hint: Any) -> Any:
    """Return a fitting value with the types that a frozen config keeps.

    Collections become tuples (sets sorted), mappings are copied, and numbers become Python's.
    """
    if get_origin(hint) in (Union, UnionType):
        return kept(value, next(each for each in get_args(hint) if fits(value, each)))
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin is Mapping:
        return {key: kept(each, inner[1]) for key, each in value.items()}
    if origin in (Collection, tuple):
        values = sorted(value) if isinstance(value, (set, frozenset)) else value
        return tuple(values) if _are(values, inner[0]) else tuple(kept(each, inner[0]) for each in values)
    if origin in (int, float):
        whole = isinstance(value, Integral) and (origin is int or abs(int(value)) <= _EXACT)
        return int(value) if whole else float(value)
    return os.fspath(value) if origin is str and isinstance(value, os.PathLike) else value


def _are(values: Any, kind: Any) -> bool:
    """Return True if ``kind`` is int or str and every value has exactly this type (a bool is not an int).

    The types are compared in one pass, since a list may hold 250,000 values.
    """
    return kind in (int, str) and set(map(type, values)) == {kind}


def misfits(name: str, value: object, hint: Any) -> list[str]:
    """Return one sentence for each problem of a value that does not fit. Values of a mapping are named one by one."""
    inner = next((get_args(each) for each in (hint, *get_args(hint)) if get_origin(each) is Mapping), None)
    if inner and isinstance(value, Mapping) and all(fits(key, inner[0]) for key in value):
        wrong = {f"{name}[{key!r}]": each for key, each in value.items() if not fits(each, inner[1])}
        return [said for place, each in wrong.items() for said in misfits(place, each, inner[1])]
    return [f"{name}={value!r} must be {_words(hint)}"]


def _words(hint: Any, many: bool = False) -> str:
    """Return the values that a type hint allows, in words for an error message; in the plural if ``many``."""
    *most, last = _alternatives(hint, many)
    return f"{', '.join(most)} or {last}" if most else last


def _alternatives(hint: Any, many: bool) -> list[str]:
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, UnionType):
        return [word for each in inner for word in _alternatives(each, many)]
    if origin in (bool, Literal):
        return [repr(each) for each in inner or (True, False)]
    if origin is Mapping:
        return [f"{'mappings' if many else 'a mapping'} of {_words(inner[0], True)} to {_words(inner[1], True)}"]
    if origin in (Collection, tuple):
        return [f"{'lists' if many else 'a list'} of {_words(inner[0], True)}"]
    return [_ONE_AND_MANY[origin][many] if origin in _ONE_AND_MANY else f"of type {origin.__name__}"]


def _is_list(value: object) -> bool:
    return isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes))


def _default(spec: Field[Any]) -> Any:
    if spec.default_factory is not MISSING:
        return spec.default_factory()
    return None if spec.default is MISSING else spec.default


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)
