"""Memory of objects: the bytes of all tensors in them, each counted once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

from torch import Tensor

Held = TypeVar("Held")


def bytes_of(held: object) -> int:
    """Return the bytes of the tensors in an object, or in its mappings, sequences and dataclasses.

    Shared memory counts once.
    """
    return sum({(x.data_ptr(), x.nbytes): x.nbytes for x in _tensors(held)}.values())


def in_own_memory(held: Held) -> Held:
    """Return a tensor, or a tuple or dataclass of tensors, none of which keeps more memory alive than its own.

    Tensors read from a file share one allocation, which is kept as long as any of them is.
    """
    made: Any = held
    if isinstance(held, Tensor):
        made = held.clone() if held.untyped_storage().nbytes() > held.nbytes else held
    elif isinstance(held, tuple):
        made = tuple(in_own_memory(each) for each in held)
    elif is_dataclass(held) and not isinstance(held, type):
        made = replace(held, **{field.name: in_own_memory(getattr(held, field.name)) for field in fields(held)})
    return cast(Held, made)


def _tensors(held: object) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, Mapping):
        yield from _tensors(list(held.values()))
    elif isinstance(held, (list, tuple)):
        for each in held:
            yield from _tensors(each)
    elif is_dataclass(held) and not isinstance(held, type):
        for field in fields(held):
            yield from _tensors(getattr(held, field.name))
    elif hasattr(held, "__dict__"):
        yield from _tensors(vars(held))
