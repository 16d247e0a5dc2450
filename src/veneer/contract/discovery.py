"""Finds methods: concrete config classes that have been defined, in any file."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

C = TypeVar("C")


def concrete(base: Callable[..., C]) -> dict[str, type[C]]:
    """Return the subclasses of a contract that are methods, by ``peft_type``.

    A method has its own format and no abstract parts, and its module still defines it.
    """
    return {vars(cls)["peft_type"]: cls for cls in _subclasses(cast("type[C]", base)) if _is_method(cls)}


def _subclasses(cls: type[C]) -> Iterator[type[C]]:
    for each in cls.__subclasses__():
        yield each
        yield from _subclasses(each)


def _is_method(cls: type) -> bool:
    there = getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls
    return there and "peft_type" in vars(cls) and not inspect.isabstract(cls)
