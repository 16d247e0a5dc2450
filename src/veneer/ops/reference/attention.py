"""Causal attention over packed sequences in plain torch, one dense matrix a sequence: the specification."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=_wide(q), device=q.device)
    for start, stop in pairwise(cu_seqlens.tolist()):
        scores, _ = _scores(_heads(q[start:stop]), _kv_heads(k, q, start, stop), scale, window, softcap)
        lse[:, start:stop] = torch.logsumexp(scores, dim=-1)
        out[start:stop] = (torch.softmax(scores, dim=-1) @ _kv_heads(v, q, start, stop)).transpose(0, 1).to(q.dtype)
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
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for start, stop in pairwise(cu_seqlens.tolist()):
        qs, ks, vs = _heads(q[start:stop]), _kv_heads(k, q, start, stop), _kv_heads(v, q, start, stop)
        do = _heads(dout[start:stop])
        scores, slope = _scores(qs, ks, scale, window, softcap)
        p = torch.exp(scores - lse[:, start:stop, None])
        delta = (do * _heads(out[start:stop])).sum(-1, keepdim=True)
        ds = p * (do @ vs.mT - delta) * slope * scale
        dq[start:stop] = (ds @ ks).transpose(0, 1).to(q.dtype)
        dk[start:stop] = _sum_groups(ds.mT @ qs, k.shape[1]).to(k.dtype)
        dv[start:stop] = _sum_groups(p.mT @ do, v.shape[1]).to(v.dtype)
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, scale: float, window: int, softcap: float) -> tuple[Tensor, Tensor | float]:
    """Return the scores (heads, t, t) after the soft cap and the mask, and the cap's derivative at each score (1.0
    without a cap).
    """
    scores = q @ k.mT * scale
    slope: Tensor | float = 1.0
    if softcap:
        tanh = torch.tanh(scores / softcap)
        scores, slope = softcap * tanh, 1 - tanh**2
    t = torch.arange(q.shape[1], device=q.device)
    ahead = t[:, None] - t[None, :]
    visible = (ahead >= 0) & (ahead < window) if window else ahead >= 0
    return scores.masked_fill(~visible, float("-inf")), slope


def _heads(x: Tensor) -> Tensor:
    """Rearrange (t, heads, d) to (heads, t, d), in at least float32."""
    return x.transpose(0, 1).to(_wide(x))


def _kv_heads(x: Tensor, q: Tensor, start: int, stop: int) -> Tensor:
    return _heads(x[start:stop]).repeat_interleave(q.shape[1] // x.shape[1], dim=0)


def _sum_groups(x: Tensor, kv_heads: int) -> Tensor:
    """Sum (q_heads, t, d) over the query heads of each key head, to (t, kv_heads, d)."""
    return x.reshape(kv_heads, x.shape[0] // kv_heads, *x.shape[1:]).sum(1).transpose(0, 1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
