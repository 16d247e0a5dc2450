"""Scan of the gated delta rule by csrc/scan, in float32 and bfloat16; the reference computes others, and Mamba 2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.ops.cpu.dtypes import is_served
from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.memory import address
from veneer.ops.reference import scan as reference
from veneer.ops.rows import same_dtype
from veneer.ops.state.scan import ScanInput


def scan(given: ScanInput, cu_seqlens: Tensor, delta: bool, known: Tensor | None) -> Tensor:
    if not delta or not is_served(*given.tensors):
        return reference.scan(given, cu_seqlens, delta, known)
    for x in given.tensors:  # before autograd, which says less of a tensor without memory
        address(x)
    y: Tensor = _Scan.apply(known, cu_seqlens, *given.tensors)  # type: ignore[no-untyped-call]
    return y


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, known: Tensor | None, cu_seqlens: Tensor, *given: Tensor) -> Tensor:
        ctx.save_for_backward(cu_seqlens, *given)
        if known is not None:
            return known.detach()
        parts, (sizes, bounds) = _parts(given), _sizes(given, cu_seqlens)
        y = torch.empty(given[2].shape, dtype=given[2].dtype)
        scratch, n_threads = _scratch(sizes, bounds, backward=False)
        kernels().scan_forward(sizes, bounds, _places(*parts), _places(y), address(scratch), n_threads)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cu_seqlens, *given = ctx.saved_tensors
        parts, (sizes, bounds) = _parts(given), _sizes(given, cu_seqlens)
        own = _with_heads(same_dtype(dy, given[2]))
        gradients = [torch.empty(x.shape, dtype=x.dtype) for x in parts]
        scratch, n_threads = _scratch(sizes, bounds, backward=True)
        kernels().scan_backward(
            sizes, bounds, _places(*parts), _places(own), _places(*gradients), address(scratch), n_threads
        )
        return None, None, *(same_dtype(found, x) for found, x in zip(gradients, given, strict=True))


def _parts(given: tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    """Return the tensors as the kernels read them: values in their own dtype, all else in float32."""
    q, k, v, log_decay, beta = given
    return [_with_heads(x) for x in (q.float(), k.float(), v, log_decay.float(), beta.float())]


def _with_heads(x: Tensor) -> Tensor:
    """Return x (n, h, …) with a contiguous last axis, if it has one behind the heads."""
    return x if x.ndim == 2 or x.shape[2] == 1 or x.stride(2) == 1 else x.contiguous()


def _sizes(given: tuple[Tensor, ...] | list[Tensor], cu_seqlens: Tensor) -> tuple[list[int], list[int]]:
    q, _, v, *_ = given
    return [q.shape[1], v.shape[1], q.shape[2], v.shape[2], DTYPES[v.dtype]], cu_seqlens.tolist()


def _places(*parts: Tensor) -> list[int]:
    return [number for x in parts for number in (address(x), *x.stride()[:2])]


def _scratch(sizes: list[int], bounds: list[int], *, backward: bool) -> tuple[Tensor, int]:
    """Return the memory of the threads, and their number."""
    n_threads = min(kernels().max_threads(), (len(bounds) - 1) * sizes[0 if backward else 1])
    return torch.empty(n_threads * kernels().scan_scratch_bytes(sizes, bounds, backward), dtype=torch.uint8), n_threads
