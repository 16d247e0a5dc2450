"""Kernels under autograd, to measure or check both passes at once. A fused block calls each pass itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.ops.attention import AttentionOptions, attention_backward, attention_forward
from veneer.ops.forks import Fork
from veneer.ops.glu import glu_backward, glu_forward
from veneer.ops.grouped_low_rank import AdapterRuns, LowRankGroup, Run, add_grouped_low_rank, grouped_low_rank_backward
from veneer.ops.norm import layer_norm_backward, layer_norm_forward, rms_norm_backward, rms_norm_forward
from veneer.ops.rotary import rotate

PLAIN = AttentionOptions()
Gradients = tuple[Tensor | None, ...]


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, *, backend: str | None = None) -> Tensor:
    """RMSNorm of x (…, d), with gradients in x and weight (d,)."""
    return _RmsNorm.apply(x, weight, eps, offset, backend)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: str | None = None) -> Tensor:
    """LayerNorm of x (…, d), with gradients in x, weight (d,) and bias (d,)."""
    return _LayerNorm.apply(x, weight, bias, eps, backend)


def glu(gate: Tensor, up: Tensor, activation: str, *, backend: str | None = None) -> Tensor:
    """Gated unit ``act(gate) * up``, with gradients in both; only the two are kept."""
    return _Glu.apply(gate, up, activation, backend)


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Queries and keys (b, heads, t, d), rotated by their positions' angles, with gradients in both."""
    return _Rotary.apply(q, cos, sin, interleaved, backend), _Rotary.apply(k, cos, sin, interleaved, backend)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    options: AttentionOptions = PLAIN,
    forks: Sequence[Fork] = (),
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention within each packed sequence, with gradients in q, k and v (n, heads, head_dim)."""
    return _Attention.apply(q, k, v, cu_seqlens, (options, forks, sinks))


def grouped_low_rank(
    x: Tensor,
    a_list: Sequence[Tensor],
    b_list: Sequence[Tensor],
    scales: Sequence[float],
    row_to_adapter: Tensor,
    *,
    onto: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``onto + scale * B A x`` with each row's own adapter (-1: none); gradients in x, onto, every a and every b."""
    how = (tuple(scales), runs_of(row_to_adapter), backend)
    return _GroupedLowRank.apply(x, onto, how, *a_list, *b_list)


def runs_of(row_to_adapter: Tensor) -> AdapterRuns:
    """Runs of rows, given each row's adapter (n,), -1 for none."""
    n_rows = len(row_to_adapter)
    changes = (row_to_adapter[1:] != row_to_adapter[:-1]).nonzero()[:, 0] + 1
    bounds = [0, *changes.tolist(), n_rows] if n_rows else [0]
    owners = row_to_adapter[bounds[:-1]].tolist()
    runs = zip(owners, bounds[:-1], bounds[1:], strict=True)
    return AdapterRuns(tuple(Run(*run) for run in runs if run[0] >= 0), n_rows)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, backend: str | None) -> Tensor:
        y, rstd = rms_norm_forward(x, weight, eps, offset, backend=backend)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset, ctx.backend = offset, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1]
        dx, dw = rms_norm_backward(dy, x, weight, rstd, ctx.offset, weight_grad=wanted, backend=ctx.backend)
        return dx, dw, None, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, backend: str | None) -> Tensor:
        y, mean, rstd = layer_norm_forward(x, weight, bias, eps, backend=backend)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.backend = backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dx, dw, db = layer_norm_backward(dy, x, weight, mean, rstd, weight_grad=wanted, backend=ctx.backend)
        return dx, dw, db, None, None


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str, backend: str | None) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.backend = activation, backend
        return glu_forward(gate, up, activation, backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup, _ = glu_backward(dh, gate, up, ctx.activation, backend=ctx.backend)
        return dgate, dup, None, None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backend: str | None) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.backend = interleaved, backend
        return rotate(x, cos, sin, interleaved=interleaved, backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dx = rotate(dy, cos, sin, interleaved=ctx.interleaved, inverse=True, backend=ctx.backend)
        return dx, None, None, None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        how: tuple[AttentionOptions, Sequence[Fork], Tensor | None],
    ) -> Tensor:
        out, lse = attention_forward(q, k, v, cu_seqlens, *how)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        ctx.how = how[:2]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
        dq, dk, dv = attention_backward(dout, (q, k, v), (out, lse), cu_seqlens, *ctx.how)
        return dq, dk, dv, None, None


class _GroupedLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, onto: Tensor | None, how: tuple[tuple[float, ...], AdapterRuns, str | None], *pairs: Tensor
    ) -> Tensor:
        scales, rows, backend = how
        group = _group(pairs, scales)
        y = x.new_zeros(x.shape[0], pairs[-1].shape[0]) if onto is None else onto.clone()
        u = add_grouped_low_rank(x, [group], rows, [y], backend=backend)
        ctx.save_for_backward(x, u, *pairs)
        ctx.how, ctx.adds = how, onto is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u, *pairs = ctx.saved_tensors
        scales, rows, backend = ctx.how
        dx, (das,), (dbs,) = grouped_low_rank_backward(
            [dy], x, u, [_group(pairs, scales)], rows, input_grad=ctx.needs_input_grad[0], backend=backend
        )
        grads = (None if g is None else g.to(p.dtype) for g, p in zip((*das, *dbs), pairs, strict=True))
        return dx, dy if ctx.adds else None, None, *grads


def _group(pairs: Sequence[Tensor], scales: tuple[float, ...]) -> LowRankGroup:
    half = len(scales)
    return LowRankGroup(tuple(pairs[:half]), tuple(pairs[half:]), scales)
