"""The memory that things hold: the bytes of all tensors in them, each counted once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass

from torch import Tensor


def bytes_of(held: object) -> int:
    """Bytes of the tensors in a thing, or in mappings, sequences and dataclasses in it; what is shared counts once."""
    return sum({(x.data_ptr(), x.nbytes): x.nbytes for x in _tensors(held)}.values())


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
