"""Packed terms by csrc/terms."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.memory import address
from veneer.ops.packed import ROWS, PackedWeight
from veneer.ops.reference import terms as reference
from veneer.ops.rows import put_back, with_rows
from veneer.ops.terms import TERM_KINDS, PackedTerm


def apply(term: PackedTerm, x: Tensor, y: Tensor, add: bool) -> None:
    if x.dtype not in DTYPES:
        reference.apply(term, x, y, add)
        return
    rows, written = with_rows(x), with_rows(y)  # held until the kernel is done: either may be a copy
    kernels().terms_apply(
        TERM_KINDS.index(term.kind),
        list(term.sizes),
        address(term.values),
        0 if term.index is None else address(term.index),
        len(x),
        DTYPES[x.dtype],
        *(number for each in (rows, written) for number in (address(each), each.stride(0))),
        add,
    )
    put_back(written, y)


def make(term: PackedTerm, weight: PackedWeight) -> Tensor:
    if weight.dtype not in ROWS:
        return reference.make(term, weight)
    panels = torch.empty_like(weight.panels)
    kernels().terms_make(
        list(term.sizes),
        address(term.values),
        DTYPES[weight.dtype],
        weight.depth,
        *map(address, (weight.panels, panels)),
    )
    return panels
