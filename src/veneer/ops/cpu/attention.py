"""Causal attention by csrc/attention, in float32 and bfloat16; the reference computes other dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.cpu.dtypes import is_served
from veneer.ops.cpu.module import DTYPES, kernels
from veneer.ops.memory import address
from veneer.ops.reference import attention as reference
from veneer.ops.rows import same_dtype


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    if not is_served(q):
        return reference.attention_forward(q, k, v, cu_seqlens, scale, window, softcap)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
    sizes = _sizes(q, k, cu_seqlens)
    places = [_place(x) for x in _with_features_together(q, k, v, out)]
    scratch, n_threads = _scratch(sizes, backward=False)
    kernels().attention_forward(
        *sizes, scale, window, softcap, [p[1] for p in places], address(lse), address(scratch), n_threads
    )
    return out, lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if not is_served(q):
        return reference.attention_backward(dout, q, k, v, out, lse, cu_seqlens, scale, window, softcap)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    sizes = _sizes(q, k, cu_seqlens)
    places = [_place(x) for x in _with_features_together(q, k, v, out, same_dtype(dout, q), dq, dk, dv)]
    scratch, n_threads = _scratch(sizes, backward=True)
    kernels().attention_backward(
        *sizes, scale, window, softcap, [p[1] for p in places], address(lse), address(scratch), n_threads
    )
    return dq, dk, dv


def _sizes(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> tuple[list[int], int, int, int, int]:
    return cu_seqlens.tolist(), q.shape[1], k.shape[1], q.shape[2], DTYPES[q.dtype]


def _with_features_together(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous() for x in tensors]


def _place(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Return the tensor, which the caller must keep alive, and its address, token stride and head stride."""
    return x, (address(x), x.stride(0), x.stride(1))


def _scratch(sizes: tuple[list[int], int, int, int, int], backward: bool) -> tuple[Tensor, int]:
    n_tasks = (len(sizes[0]) - 1) * sizes[2]
    n_threads = max(1, min(kernels().max_threads(), n_tasks))
    thread_bytes = kernels().attention_scratch_bytes(*sizes, backward)
    return torch.empty(n_threads * thread_bytes // 64, 16, dtype=torch.float32), n_threads
