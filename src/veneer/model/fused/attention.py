"""Attention half of a block: ``x + post_norm(O attend(rotate(norm(Q n)), rotate(norm(K n)), V n))``, n = norm(x).

It is one autograd node with a hand-written backward, which keeps x, q, k, v, attention's output and the A-products. The
normed x is computed again. q, k and v are too if the half ``recomputes``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.model.blueprint.heads import HeadLayout
from veneer.model.fused.parts import NoNorm, Norm, add_onto, as_shape, parted, scaled, times
from veneer.ops.attention import AttentionOptions, attention_backward, attention_forward
from veneer.ops.linear import op
from veneer.ops.linear.layer import LinearLayer, tensors_of
from veneer.ops.rotary import rotate


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionHalf:
    """Parts of one half as they act now. ``q_norm`` and ``k_norm`` act on each head or on all at once, before the
    rotation, of neighbouring numbers if ``interleaved``. A half that sums first takes its output times ``multiplier``.

    ``dtype`` is that of all values between the norm and the sum: the stream's, or bfloat16 with a float32 stream
    (autocast). ``sums`` is False if the half returns only its addition to the stream, for bottlenecks that act on that
    alone.
    """

    dtype: torch.dtype
    norm: Norm
    qkv: tuple[LinearLayer, ...]
    out: LinearLayer
    heads: HeadLayout
    options: AttentionOptions
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    post_norm: Norm | None = None
    interleaved: bool = False
    multiplier: float = 1.0
    recomputes: bool = False
    sums: bool = True

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Tensors of the records, which receive gradients."""
        return tensors_of((*self.qkv, self.out))


@dataclass(frozen=True, slots=True)
class RotationTables:
    """Half tables of the rotation, (b or 1, t, half), None if nothing is rotated, and the bounds of the sequences.

    The bounds are positions in the flattened batch.
    """

    cos: Float[Tensor, "#b t half"] | None
    sin: Float[Tensor, "#b t half"] | None
    cu_seqlens: Int[Tensor, " n_sequences_plus_1"]


def attention_half(x: Float[Tensor, "b t d"], half: AttentionHalf, positions: RotationTables) -> Float[Tensor, "b t d"]:
    """Return the stream after the attention half; only its addition to the stream, if the half does not ``sum``."""
    y: Tensor = _AttentionHalf.apply(x, half, positions, *half.tensors)  # type: ignore[no-untyped-call]
    return y


class _AttentionHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, half: AttentionHalf, positions: RotationTables, *tensors: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1])
            normed, statistics = half.norm.forward(flat)
            heads, kept_qkv = _heads(normed.to(half.dtype), half, x.shape, positions)
            del normed
            attended, lse = attention_forward(*heads.qkv, positions.cu_seqlens, half.options)
            (out,), of_out = op.forward(attended.view(attended.shape[0], -1), [half.out])
            kept_out: tuple[Tensor, ...] = ()
            if half.post_norm is not None:
                normed_out, statistics_out = half.post_norm.forward(out)
                kept_out, out = (out, statistics_out), normed_out
            out = add_onto(flat, times(out, half.multiplier)) if half.sums else out
        ctx.half, ctx.positions = half, positions
        kept_qkv = kept_qkv.without_products() if half.recomputes else kept_qkv
        kept_heads = () if half.recomputes else (heads.qkv, heads.q_kept, heads.k_kept)
        kept = (kept_qkv.tensors, of_out.tensors, *kept_heads)
        ctx.sizes = [len(t) for t in kept]
        ctx.save_for_backward(x, statistics, attended, lse, *(t for part in kept for t in part), *kept_out)
        return as_shape(out, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        half, positions, n_inner_tensors = ctx.half, ctx.positions, len(tensors_of(ctx.half.qkv))
        x, statistics, attended, lse, *rest = ctx.saved_tensors
        of_qkv, of_out, *kept_heads, kept_out = parted(rest, ctx.sizes)
        kept_qkv, kept_attended = op.SavedForBackward.of(of_qkv, half.qkv), op.SavedForBackward.of(of_out, [half.out])
        wanted = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[3 : 3 + n_inner_tensors])
        with torch.autocast(x.device.type, enabled=False):
            flat, dy = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, x.shape[-1])
            dout = scaled(dy.to(half.dtype), half.multiplier if half.sums else 1.0)
            dout = dout if half.post_norm is None else half.post_norm.backward(dout, *kept_out)
            out_grads = op.backward([dout], attended.view(len(flat), -1), kept_attended, [half.out], input_grad=wanted)
            if not wanted or out_grads.x is None:
                return None, None, None, *(None,) * n_inner_tensors, *out_grads.records
            dattended = out_grads.x.view(attended.shape)
            if half.recomputes:
                heads, again = _heads(half.norm.forward(flat)[0].to(half.dtype), half, x.shape, positions)
                kept_qkv = replace(kept_qkv, products=again.products)
            else:
                heads = _Heads(*kept_heads)
            dqkv = attention_backward(dattended, heads.qkv, (attended, lse), positions.cu_seqlens, half.options)
            dq = _turned_back(dqkv[0], half, half.q_norm, heads.q_kept, x.shape, positions)
            dk = _turned_back(dqkv[1], half, half.k_norm, heads.k_kept, x.shape, positions)
            del heads
            normed = half.norm.forward(flat)[0].to(half.dtype)
            joined = half.heads.join((dq, dk, dqkv[2]))
            found = op.backward(joined, normed, kept_qkv, half.qkv, input_grad=ctx.needs_input_grad[0], overwrite=True)
            dx = None if found.x is None else half.norm.backward(found.x, flat, statistics)
            dx = None if dx is None else (dx.add_(dy) if half.sums else dx).view(x.shape)
        return dx, None, None, *found.records, *out_grads.records


@dataclass(frozen=True, slots=True)
class _Heads:
    """q, k and v in attention's layout, with the tensors for the backward pass through their norms."""

    qkv: tuple[Tensor, Tensor, Tensor]
    q_kept: tuple[Tensor, ...]
    k_kept: tuple[Tensor, ...]


def _heads(
    normed: Tensor, half: AttentionHalf, size: torch.Size, positions: RotationTables
) -> tuple[_Heads, op.SavedForBackward]:
    """Projected, normed and rotated heads, with the tensors for the backward pass through the projections."""
    raw, kept = op.forward(normed, half.qkv)
    q, k, v = half.heads.split(raw)
    q, q_kept = _turned(q, half, half.q_norm, size, positions)
    k, k_kept = _turned(k, half, half.k_norm, size, positions)
    return _Heads((q, k, v), q_kept, k_kept), kept


def _turned(
    heads: Tensor, half: AttentionHalf, norm: Norm | None, size: torch.Size, positions: RotationTables
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Normed and rotated heads (n, heads, d), with the tensors for the backward pass. Without a norm they are
    overwritten.
    """
    kept: tuple[Tensor, ...] = ()
    if norm is not None:
        rows = _rows(heads, norm)
        normed, statistics = norm.forward(rows)
        kept, heads = (rows, statistics), normed.view(heads.shape)
    _rotate(heads, half, size, positions)
    return heads, kept


def _turned_back(
    grad: Tensor,
    half: AttentionHalf,
    norm: Norm | None,
    kept: tuple[Tensor, ...],
    size: torch.Size,
    positions: RotationTables,
) -> Tensor:
    _rotate(grad, half, size, positions, inverse=True)
    return grad if norm is None else norm.backward(_rows(grad, norm), *kept).view(grad.shape)


def _rows(heads: Tensor, norm: Norm) -> Tensor:
    """Heads (n, heads, d) as the rows of a norm: each head, or all heads of a token."""
    over_all = not isinstance(norm, NoNorm) and len(norm.weight) != heads.shape[-1]
    return heads.reshape(len(heads), -1) if over_all else heads


def _rotate(
    heads: Tensor, half: AttentionHalf, size: torch.Size, positions: RotationTables, *, inverse: bool = False
) -> None:
    """Rotate heads in place."""
    if positions.cos is not None and positions.sin is not None:
        view = heads.view(size[0], size[1], *heads.shape[1:]).transpose(1, 2)
        rotate(view, positions.cos, positions.sin, interleaved=half.interleaved, inverse=inverse, in_place=True)
