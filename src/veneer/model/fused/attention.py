"""The attention half of a block: ``x + post_norm(O attend(rotate(norm(Q n)), rotate(norm(K n)), V n))``, n = norm(x).

One autograd node with a hand-written backward. Kept for it: x, q, k, v, attention's output and the A-products; the
normed x is made again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veneer.model.fused.parts import RmsNorm
from veneer.ops.attention import AttentionOptions, attention_backward, attention_forward
from veneer.ops.lora import Projection, lora_backward, lora_forward
from veneer.ops.rotary import rotate


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionHalf:
    """The parts of one half as they act now. ``q_norm`` and ``k_norm`` act on each head, before it is rotated."""

    norm: RmsNorm
    qkv: tuple[Projection, Projection, Projection]
    out: Projection
    head_dim: int
    options: AttentionOptions
    q_norm: RmsNorm | None = None
    k_norm: RmsNorm | None = None
    post_norm: RmsNorm | None = None

    @property
    def pairs(self) -> tuple[Tensor | None, ...]:
        """The low-rank factors, which gradients flow to."""
        return tuple(t for p in (*self.qkv, self.out) for t in (p.a, p.b))


@dataclass(frozen=True, slots=True)
class Positions:
    """Half tables of the rotation, (b or 1, t, half), and the bounds of the sequences in the flattened batch."""

    cos: Float[Tensor, "#b t half"]
    sin: Float[Tensor, "#b t half"]
    cu_seqlens: Int[Tensor, " n_sequences_plus_1"]


def attention_half(x: Float[Tensor, "b t d"], half: AttentionHalf, positions: Positions) -> Float[Tensor, "b t d"]:
    """The stream after the attention half."""
    y: Tensor = _AttentionHalf.apply(x, half, positions, *half.pairs)  # type: ignore[no-untyped-call]
    return y


class _AttentionHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, half: AttentionHalf, positions: Positions, *pairs: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1])
            normed, rstd = half.norm.forward(flat)
            raw, u = lora_forward(normed, half.qkv)
            del normed
            q, k, v = (t.view(t.shape[0], -1, half.head_dim) for t in raw)
            q, q_kept = _turned(q, half.q_norm, x.shape, positions)
            k, k_kept = _turned(k, half.k_norm, x.shape, positions)
            attended, lse = attention_forward(q, k, v, positions.cu_seqlens, half.options)
            (out,), u_out = lora_forward(attended.view(attended.shape[0], -1), [half.out])
            kept_out: tuple[Tensor, ...] = ()
            if half.post_norm is not None:
                normed_out, rstd_out = half.post_norm.forward(out)
                kept_out, out = (out, rstd_out), normed_out
            out.add_(flat)
        ctx.half, ctx.positions = half, positions
        ctx.counts = len(q_kept), len(k_kept), len(kept_out)
        ctx.save_for_backward(x, rstd, u, q, k, v, attended, lse, u_out, *q_kept, *k_kept, *kept_out)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        half, positions = ctx.half, ctx.positions
        x, rstd, u, q, k, v, attended, lse, u_out, *kept = ctx.saved_tensors
        n_q, n_k, _ = ctx.counts
        wanted = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[3:9])
        with torch.autocast(x.device.type, enabled=False):
            flat, dy = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, x.shape[-1])
            dout = dy if half.post_norm is None else half.post_norm.backward(dy, *kept[n_q + n_k :])
            out_grads = lora_backward([dout], attended.view(len(flat), -1), u_out, [half.out], input_grad=wanted)
            if not wanted or out_grads.x is None:
                return None, None, None, *(None,) * 6, *out_grads.a, *out_grads.b
            dattended = out_grads.x.view(attended.shape)
            dq, dk, dv = attention_backward(dattended, (q, k, v), (attended, lse), positions.cu_seqlens, half.options)
            dq = _turned_back(dq, half.q_norm, kept[:n_q], x.shape, positions)
            dk = _turned_back(dk, half.k_norm, kept[n_q : n_q + n_k], x.shape, positions)
            normed, _ = half.norm.forward(flat)
            dqkv = [g.view(len(flat), -1) for g in (dq, dk, dv)]
            found = lora_backward(dqkv, normed, u, half.qkv, input_grad=ctx.needs_input_grad[0])
            dx = None if found.x is None else half.norm.backward(found.x, flat, rstd).add_(dy).view(x.shape)
        pairs = (g for pair in zip((*found.a, *out_grads.a), (*found.b, *out_grads.b), strict=True) for g in pair)
        return dx, None, None, *pairs


def _turned(
    heads: Tensor, norm: RmsNorm | None, size: torch.Size, positions: Positions
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Heads (n, heads, d) normed and rotated, and what the way back needs. Without a norm they are overwritten."""
    kept: tuple[Tensor, ...] = ()
    if norm is not None:
        normed, rstd = norm.forward(heads)
        kept, heads = (heads, rstd), normed
    view = heads.view(size[0], size[1], *heads.shape[1:]).transpose(1, 2)
    rotate(view, positions.cos, positions.sin, in_place=True)
    return heads, kept


def _turned_back(
    grad: Tensor, norm: RmsNorm | None, kept: list[Tensor], size: torch.Size, positions: Positions
) -> Tensor:
    view = grad.view(size[0], size[1], *grad.shape[1:]).transpose(1, 2)
    rotate(view, positions.cos, positions.sin, inverse=True, in_place=True)
    return grad if norm is None else norm.backward(grad, *kept)
