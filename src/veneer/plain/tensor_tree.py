"""Tensors in objects: their bytes, each counted once, and copies of an object with other tensors, or elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Held = TypeVar("Held")


def bytes_of(held: object) -> int:
    """Return the bytes of the tensors in an object, or in its mappings, sequences and dataclasses.

    Memory that several tensors share counts once, and whole. Tensors on the meta device have none.
    """
    memory = (x.untyped_storage() for x in _tensors(held) if not x.is_meta)
    return sum({each.data_ptr(): each.nbytes() for each in memory}.values())


def told_bytes(held: object) -> int:
    """Return the bytes of all tensors that an object holds, at any depth, by their shapes; each tensor counts once.

    Tensors on the meta device count too.
    """
    return sum(x.nbytes for x in _tensors(held))


def in_own_memory(held: Held) -> Held:
    """Return a tensor, or a tuple or dataclass of tensors, in which each view of a larger memory is replaced by a copy.

    Tensors read from a file share one allocation, which is kept as long as any of them is.
    """
    return mapped(held, lambda x: x.clone() if x.untyped_storage().nbytes() > x.nbytes else x)


def moved(held: Held, device: torch.device) -> Held:
    """Return a copy of an object with its tensors on a device. A tensor that occurs twice is moved once."""
    made = dict[tuple[object, ...], Tensor]()

    def there(x: Tensor) -> Tensor:
        if x.is_meta or x.device == device:
            return x
        place = (x.data_ptr(), x.shape, x.stride(), x.dtype)
        if place not in made:
            made[place] = x.to(device)
        return made[place]

    return mapped(held, there)


def in_one_copy(held: Held, device: torch.device) -> Held:
    """Return a copy of an object with its tensors on a device. One transfer moves all tensors of integers that lie in
    host memory.
    """
    found = list[Tensor]()
    mapped(held, lambda x: _noted(x, found))
    sent = torch.cat([x.reshape(-1) for x in found]).to(device, non_blocking=True)  # the driver has its own copy
    parts = iter(torch.split(sent, [x.numel() for x in found]))
    return mapped(held, lambda x: next(parts).view(x.shape) if x.is_cpu else x)


def _noted(x: Tensor, found: list[Tensor]) -> Tensor:
    """Return the tensor; append it to ``found`` if it is in host memory."""
    found += [x] if x.is_cpu else []
    return x


def mapped(held: Held, change: Callable[[Tensor], Tensor]) -> Held:
    """Return a copy of an object in which ``change`` has replaced each tensor, also those in its mappings, sequences
    and dataclasses, in order.

    A part in which nothing changes stays the same object.
    """
    made: Any = held
    if isinstance(held, Tensor):
        made = change(held)
    elif isinstance(held, Mapping):
        values = {key: mapped(value, change) for key, value in held.items()}
        made = held if all(new is held[key] for key, new in values.items()) else values
    elif isinstance(held, (list, tuple)):
        each = [mapped(old, change) for old in held]
        same = all(new is old for new, old in zip(each, held, strict=True))
        made = held if same else type(held)(*each) if hasattr(held, "_fields") else type(held)(each)
    elif is_dataclass(held) and not isinstance(held, type):
        parts = {field.name: getattr(held, field.name) for field in fields(held) if field.init}
        changed = {name: new for name, old in parts.items() if (new := mapped(old, change)) is not old}
        made = replace(held, **changed) if changed else held
    return cast(Held, made)


def _tensors(held: object) -> Iterator[Tensor]:
    """Yield the tensors of an object, in order. An object that occurs twice, or holds itself, is read once."""
    seen: dict[int, object] = {}  # the objects too: an id is another object's as soon as its own is gone
    left = [held]
    while left:
        each = left.pop()
        if id(each) in seen or isinstance(each, type):
            continue
        seen[id(each)] = each
        if isinstance(each, Tensor):
            yield each
        else:
            left += reversed(_parts(each))


def _parts(held: object) -> list[Any]:
    """Return the values of a mapping or sequence, the attributes of another object."""
    if isinstance(held, Mapping):
        return list(held.values())
    if isinstance(held, (list, tuple)):
        return list(held)
    if hasattr(held, "__dict__"):
        return list(vars(held).values())
    return [getattr(held, field.name) for field in fields(held)] if is_dataclass(held) else []  # one with slots
