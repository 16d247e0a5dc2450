"""Translation of a program's parts to the C++ step (`veneer.ops.cpu.step`); None for unsupported parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor

from veneer.model.blueprint.heads import HeadLayout
from veneer.model.blueprint.parts import Attention
from veneer.ops.cpu.step import LayerChange, StepHeads, StepNorm
from veneer.ops.packed import ROWS, PackedWeight
from veneer.records.deltas import LinearDelta
from veneer.serve.program.norms import BoundNorm
from veneer.serve.program.products import OwnChanges


class Register(NamedTuple):
    """Name of a register, and the widths of the tensors in it."""

    name: str
    widths: tuple[int, ...]


def norm_of(bound: BoundNorm, own: tuple[Tensor | None, Tensor | None] | None = None) -> StepNorm | None:
    """Return a norm that has one weight for all heads, or None; ``own`` replaces the base's weight and bias."""
    norm, (weight, bias) = bound.norm, own or bound.own
    if len(norm.shape) > 1 or weight is None or weight.dtype not in ROWS:
        return None
    if norm.kind == "layer":  # as `BoundNorm` does, the offset in the weight's own dtype
        weight = weight + norm.offset if norm.offset else weight
        return StepNorm(_float(weight), _float(cast(Tensor, bias).to(weight.dtype)), norm.eps, subtracts_mean=True)
    return StepNorm(_float(weight) + norm.offset, None, norm.eps, subtracts_mean=False)


def heads_at(layout: HeadLayout, first: int) -> tuple[StepHeads, StepHeads, StepHeads]:
    """Return queries, keys and values in the registers from ``first`` on, as `HeadLayout.split` splits them."""
    d = layout.head_dim
    if layout.order == "apart":
        return StepHeads(first, 0, d), StepHeads(first + 1, 0, d), StepHeads(first + 2, 0, d)
    if layout.order == "by head":
        return StepHeads(first, 0, 3 * d), StepHeads(first, d, 3 * d), StepHeads(first, 2 * d, 3 * d)
    keys, values = layout.n_heads * d, (layout.n_heads + layout.n_kv_heads) * d
    return StepHeads(first, 0, d), StepHeads(first, keys, d), StepHeads(first, values, d)


def is_plain(part: Attention) -> bool:
    """Return True if the step supports every part of an attention."""
    flat = all(len(norm.shape) == 1 for norm in part.norms)
    return flat and part.clip is None and part.temperature is None and part.alibi is None


def changes_of(own: OwnChanges, dtype: torch.dtype) -> tuple[LayerChange, ...] | None:
    """Return the changes of a version at layers, other than adding its pairs; empty if it makes none.

    Returns None if the step does not support one of them.
    """
    if own.only_adds:
        return ()
    found = tuple(_changes(own, dtype))
    return None if any(each is None for each in found) else cast(tuple[LayerChange, ...], found)


def _changes(own: OwnChanges, dtype: torch.dtype) -> Iterator[LayerChange | None]:
    for i, record in enumerate(own.records):
        whole = own.whole.get(i)
        if not _is_known(record) or not (whole is None or (isinstance(whole, PackedWeight) and whole.dtype == dtype)):
            yield None
            continue
        bias = None if record.bias is None else record.bias.detach().contiguous()
        if whole is not None and bias is not None and bias.dtype != dtype:
            yield None
            continue
        yield LayerChange(
            in_scale=_vector(record.input_scale),
            out_scale=_vector(record.output_scale),
            bias=_vector(bias),
            own_bias=bias if whole is not None else None,
            whole=whole,
            pair=own.apart[i] if own.apart else None,
            terms=own.terms[i] if own.terms else None,
        )


def _is_known(record: LinearDelta) -> bool:
    """Return True if a record, whose pair has been packed, is at most scales and a bias that float32 holds."""
    return record.is_elementary and all(tensor.dtype.itemsize <= 4 for tensor in record.tensors)


def _vector(x: Tensor | None) -> Tensor | None:
    return None if x is None else _float(x)


def _float(x: Tensor) -> Tensor:
    return x.detach().float().contiguous()
