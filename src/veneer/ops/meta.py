"""Cache of ops on the meta device: a call that was made before gets new outputs without running the op.

torch runs many ops there in Python, in up to half a millisecond. A step makes the same calls in each block.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

META = torch.device("meta")

_TENSORS = ("Tensor", "List[Tensor]")
_MOST = 10_000
"""Calls that are remembered, some megabytes."""

WRITTEN = object()
"""Of a call that returns the tensor that it writes: the one named ``out``, or the first."""

_Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
# Of the whole process: each value follows from its key alone, so models share what they find and nothing can go stale.
_KNOWN: dict[Hashable, Any] = {}  # a layout, several, None where there is no tensor; or WRITTEN


@functools.cache
def repeats(func: Any) -> bool:
    """Return True if an op can be cached: it returns new tensors, or one that it writes to, but no views."""
    schema, made = func._schema, func._schema.returns
    if func.namespace != "aten" or torch.Tag.inplace_view in func.tags:
        return False
    if schema.is_mutable:
        return len(made) == 1 and made[0].alias_info is not None and bool(made[0].alias_info.is_write)
    return all(each.alias_info is None and str(each.type) in _TENSORS for each in made)


def call_of(func: Any, args: Any, kwargs: Any) -> Hashable:
    """Return the cache key of a call: everything that the layout of its outputs depends on."""
    named = tuple((name, _signed(x)) for name, x in kwargs.items()) if kwargs else ()
    return func, torch.get_default_dtype(), tuple(map(_signed, args)), named


def _signed(x: Any) -> Hashable:
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.device
    if isinstance(x, list | tuple):
        return tuple(map(_signed, x))
    return type(x), x  # 1, 1.0 and True are equal, and give other dtypes


def outputs_of(call: Hashable) -> Any:
    """Return new outputs of a cached call, or `WRITTEN` if the call returns the tensor that it writes to. For a call
    that is not cached, return None.
    """
    known = _KNOWN.get(call)
    if known is WRITTEN:
        return WRITTEN
    return tuple(map(_made, known)) if isinstance(known, list) else _made(known)


def _made(layout: _Layout | None) -> Tensor | None:
    return None if layout is None else torch.empty_strided(layout[0], layout[1], dtype=layout[2], device=META)


def remember(call: Hashable, out: Any, given: Iterable[Tensor]) -> None:
    """Remember the layouts of a call's outputs.

    Do nothing if an output shares memory with another tensor, or has gaps.
    """
    outputs = out if isinstance(out, list | tuple) else [out]
    layouts = [None if y is None else (y.shape, y.stride(), y.dtype) for y in outputs]
    if any(_n_bytes(y) != _n_bytes(_made(layout)) for y, layout in zip(outputs, layouts, strict=True)):
        return
    memories, of_inputs = [_memory(y) for y in outputs if y is not None], {*map(_memory, given)}
    if len({*memories, *of_inputs}) == len(memories) + len(of_inputs):  # `_unsafe_view` says nothing of what it shares
        _keep(call, layouts if isinstance(out, list | tuple) else layouts[0])


def remember_written(call: Hashable) -> None:
    """Remember that a call returns the tensor that it writes to, without a change of layout."""
    _keep(call, WRITTEN)


def _keep(call: Hashable, known: Any) -> None:
    if len(_KNOWN) >= _MOST:
        _KNOWN.clear()
    _KNOWN[call] = known


def _n_bytes(y: Tensor | None) -> int:
    return 0 if y is None else y.untyped_storage().nbytes()


def _memory(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Return an empty tensor with the layout of a mixture's product on the CPU, in any dtype, rows padded to 16 bytes.

    torch's own version accepts only bfloat16 on the meta device (2.13).
    """
    groups = (len(offs),) if offs is not None and a.ndim == b.ndim == 2 else b.shape[:1] if a.ndim == b.ndim else ()
    n_rows, n_columns = a.shape[-2], b.shape[-1]
    unit = 16 // a.element_size()
    width = -(-n_columns // unit) * unit
    return a.new_empty((*groups, n_rows, width))[..., :n_columns]
