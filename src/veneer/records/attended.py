"""Formula of `records.deltas.AttendedDelta`: attention to a prompt, with a softmax of its own."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def attended_change(
    queries: Float[Tensor, "b t heads k"],
    keys: Float[Tensor, "n kv_heads k"],
    values: Float[Tensor, "n kv_heads k"],
    gate: Float[Tensor, " 1"],
) -> Float[Tensor, "b t width"]:
    """Return ``gate · softmax(q Kᵀ / √k) V`` of all heads, concatenated in order, in the queries' dtype.

    Consecutive query heads share a key head. The softmax is computed in at least float32. Source: Zhang et al. 2023,
    arXiv:2303.16199, eq. 4 to 6; the gate is their ``g_l`` without the tanh of their later code, as in PEFT.
    """
    b, t, heads, width = queries.shape
    kv_heads, dtype = keys.shape[1], queries.dtype
    grouped = queries.view(b, t, kv_heads, heads // kv_heads, width)
    scores = torch.einsum("btgrk,ngk->btgrn", grouped, keys.to(dtype)) / width**0.5
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)
    return torch.einsum("btgrn,ngk->btgrk", gate.to(dtype) * weights, values.to(dtype)).reshape(b, t, heads * width)


def turned(
    x: Float[Tensor, "b t heads k"], cos: Float[Tensor, "b t k"], sin: Float[Tensor, "b t k"]
) -> Float[Tensor, "b t heads k"]:
    """Return queries with rotary embedding; feature j is paired with j + k/2 (Su et al. 2021, arXiv:2104.09864)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, :, None] + torch.cat([-second, first], dim=-1) * sin[:, :, None]
