"""Gated delta rule with states in pages by csrc/delta, in float32 and bfloat16; the reference computes others."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.cpu.dtypes import is_served
from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.memory import address
from veneer.ops.paged_attention import PagedRows
from veneer.ops.reference import delta as reference
from veneer.ops.state.delta import DeltaInput, DeltaWeights, StateShape, StateStore


def delta_in_pages(store: StateStore, layer: int, given: DeltaInput, weights: DeltaWeights, rows: PagedRows) -> Tensor:
    if not is_served(given.q):
        return reference.delta_in_pages(store, layer, given, weights, rows)
    y, held = torch.empty(rows.n_rows, store.shape.width, dtype=given.z.dtype), delta_values(weights, given.z.dtype)
    inputs = [x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous() for x in given.tensors]
    tables = (rows.pages, rows.first_page, rows.first_row, rows.position)
    kernels().delta_in_pages(
        [*delta_sizes(store.shape), DTYPES[given.z.dtype]],
        weights.eps,
        weights.beta_scale,
        [0 if x is None else address(x) for x in held],
        [address(store.data), store.data.shape[1], store.block, layer],
        [len(rows.position), *map(address, tables)],
        [number for x in inputs for number in (address(x), *x.stride()[:2])],
        [address(y), y.stride(0)],
    )
    return y


def delta_sizes(shape: StateShape) -> list[int]:
    """Return the sizes of a state in the order of csrc/delta."""
    return [shape.n_k_heads, shape.n_v_heads, shape.k_width, shape.v_width, shape.kernel]


def delta_values(weights: DeltaWeights, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Return the weights in float32: the convolution's kernel and bias, norm (rounded to ``dtype``), rate and bias."""
    norm = weights.norm.detach().to(dtype)
    return *weights.kernel.values(), *(x.detach().float().contiguous() for x in (norm, weights.rate, weights.bias))
