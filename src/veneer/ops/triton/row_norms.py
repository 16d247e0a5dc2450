"""Norms of the rows of an updated weight in Triton: a program takes some rows, and walks along A Aᵀ for them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.ops.matmul import matmul
from veneer.ops.reference import row_norms as reference
from veneer.ops.triton.launch import block, is_served, launch

_TILE, _LARGEST_RANK = 2048, 1024


def row_norms(row_sq: Tensor, wa: Tensor, a: Tensor, b: Tensor, scale: float, least: float) -> Tensor:
    o, rank = b.shape
    if not is_served(row_sq, wa, a, b) or not 0 < rank <= _LARGEST_RANK:
        return reference.row_norms(row_sq, wa, a, b, scale, least)
    norms = torch.empty(o, dtype=b.dtype, device=b.device)
    ranks = block(rank)
    rows = max(1, min(128, _TILE // ranks))
    held = row_sq.contiguous(), wa.contiguous(), matmul(a, a.T, torch.float32), b.contiguous()
    launch(_norms_kernel, (triton.cdiv(o, rows),), *held, norms, o, rank, scale, least, RANKS=ranks, ROWS=rows)
    return norms


@triton.jit
def _norms_kernel(row_sq, wa, gram, b, norms, o, rank, scale, least, RANKS: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANKS)
    inside = rows < o
    tile = inside[:, None] & (ranks < rank)[None, :]
    place = rows.to(tl.int64)
    own = tl.load(b + place[:, None] * rank + ranks[None, :], mask=tile, other=0.0).to(tl.float32)
    products = tl.load(wa + ranks.to(tl.int64)[None, :] * o + place[:, None], mask=tile, other=0.0).to(tl.float32)
    cross = tl.sum(own * products, axis=1)
    square = tl.zeros([ROWS], tl.float32)
    for k in range(rank):
        along = tl.load(gram + k * rank + ranks, mask=ranks < rank, other=0.0)
        factor = tl.load(b + place * rank + k, mask=inside, other=0.0).to(tl.float32)
        square += factor * tl.sum(own * along[None, :], axis=1)
    total = tl.load(row_sq + rows, mask=inside, other=0.0).to(tl.float32) + 2.0 * scale * cross + scale * scale * square
    norm = tl.sqrt(tl.where(total < 0.0, 0.0, total))  # a maximum may pass NaN over
    tl.store(norms + rows, tl.where(norm < least, least, norm).to(norms.dtype.element_ty), mask=inside)
