"""Form of an object that holds tensors: everything about it except their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor

Form = str | int | float | bool | None | list["Form"]
"""Values that JSON has: a text, a number or nothing, or the name of a kind with the forms of its parts."""


def form_of(held: object) -> Form:
    """Return the form of an object: two objects have the same form if they differ only in the values of tensors."""
    if isinstance(held, Tensor):
        return ["tensor", str(held.dtype), *held.shape]
    if isinstance(held, Mapping):
        return ["mapping", *([form_of(key), form_of(value)] for key, value in held.items())]
    if isinstance(held, (list, tuple)):
        return [name_of(type(held)), *map(form_of, held)]
    if is_dataclass(held) and not isinstance(held, type):
        return [name_of(type(held)), *(form_of(getattr(held, field.name)) for field in fields(held))]
    return held if held is None or isinstance(held, (str, int, float)) else ["other", repr(held)]


def of_form(form: Form, kinds: Mapping[str, Callable[..., object]]) -> object:
    """Return the object that a form describes, with tensors on the meta device.

    ``kinds`` maps names (`name_of`) to functions that create dataclasses. Raises ValueError for a name that is not in
    ``kinds``, and TypeError or KeyError for an invalid form.
    """
    if not isinstance(form, list):
        return form
    name, parts = cast(str, form[0]), form[1:]
    if name == "tensor":
        return torch.empty(cast(Any, parts[1:]), dtype=_DTYPES[cast(str, parts[0])], device="meta")
    if name == "mapping":
        return {of_form(key, kinds): of_form(value, kinds) for key, value in cast(Any, parts)}
    values = [of_form(part, kinds) for part in parts]
    if name in _SEQUENCES:
        return _SEQUENCES[name](values)
    if name not in kinds:
        raise ValueError(f"no kind {name}")
    return kinds[name](*values)


def name_of(kind: type) -> str:
    """Return the name of a class as forms contain it: module and qualified name."""
    return f"{kind.__module__}.{kind.__qualname__}"


_SEQUENCES: dict[str, Callable[[list[Any]], object]] = {name_of(list): list, name_of(tuple): tuple}
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32)}
