"""Experts of a mixture by csrc/experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.experts import ExpertSegment, PackedStack, Router, Shared
from veneer.ops.glu import UNITS
from veneer.ops.memory import address
from veneer.ops.packed import ROWS
from veneer.ops.packed_codes import PackedCodes


def route(scores: Tensor, router: Router, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = (scores if scores.dtype in ROWS else scores.float()).contiguous()
    bias = None if bias is None else bias.contiguous()
    ids = torch.empty(len(rows), router.top_k, dtype=torch.int64)
    weights = torch.empty(len(rows), router.top_k)
    kernels().experts_route(
        *router_numbers(router),
        router.scale,
        0 if bias is None else address(bias),
        len(rows),
        DTYPES[rows.dtype],
        address(rows),
        rows.stride(0),
        address(ids),
        address(weights),
    )
    return ids, weights


def mix(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    stacks: tuple[PackedStack, PackedStack],
    activation: str,
    shared: Shared,
    segments: Sequence[ExpertSegment],
) -> Tensor:
    inner, down = stacks
    x = x if x.stride(1) == 1 else x.contiguous()
    ids, weights = ids.contiguous(), weights.contiguous()
    beside, gate = (each if each is None or each.stride(1) == 1 else each.contiguous() for each in shared)
    y = torch.empty(len(x), down.shape[1], dtype=x.dtype)
    kernels().experts_mix(
        inner.n_experts,
        ids.shape[1],
        DTYPES[inner.dtype],
        stack_numbers(inner, address(inner.panels)),
        stack_numbers(down, address(down.panels)),
        UNITS[activation],
        len(x),
        DTYPES[x.dtype],
        address(x),
        x.stride(0),
        address(ids),
        address(weights),
        *_rows(beside),
        *_rows(gate),
        *_rows(y),
        [number for segment in segments for number in _segment(segment)],
    )
    return y


def _segment(segment: ExpertSegment) -> Iterator[int]:
    """Yield the numbers of a segment for the kernel: its first row, the row after its last, and two numbers for each of
    its two pairs.

    These are the address of the pair's factors and its rank, or 0 and 0 for None.
    """
    yield from (segment.start, segment.stop)
    for pairs in segment.pairs:
        yield from (0, 0) if pairs is None else (address(pairs.factors), *pairs.ranks)


def _rows(x: Tensor | None) -> tuple[int, int]:
    """Return the address of x, whose last axis must be contiguous, and the stride of its rows; 0 and 0 for None."""
    return (0, 0) if x is None else (address(x), x.stride(0))


def router_numbers(router: Router) -> list[int]:
    """Return a router's numbers for csrc/experts: experts, top_k, sigmoid, normalized, groups, kept groups."""
    by_sigmoid = router.values == "sigmoid"
    return [router.n_experts, router.top_k, by_sigmoid, router.normalized, router.n_groups, router.kept_groups]


def stack_numbers(stack: PackedStack, panels: int) -> list[int]:
    """Return a stack's numbers for csrc/experts. ``panels`` is the address of its panels."""
    first = stack.first
    coding = (first.coding_number, first.unit) if isinstance(first, PackedCodes) else (0, 0)
    bias = 0 if stack.bias is None else address(stack.bias)
    return [*first.shape, first.depth, panels, first.panels.nbytes, *coding, bias]
