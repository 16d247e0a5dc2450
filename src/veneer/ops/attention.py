"""Causal attention for training: grouped heads, packed sequences, sliding windows, soft-capped scores, O(n) memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from jaxtyping import Float, Int
from torch import Tensor

from veneer.errors import ConfigError, ShapeError
from veneer.ops.dispatch import implementation
from veneer.ops.forks import Fork, ScoreForm, add_stem_gradients, join_stems


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOptions:
    """Options of attention: scale, window and soft cap of the scores.

    ``scale`` multiplies q·k (None: 1/√head_dim). A query attends to itself and ``window - 1`` tokens before it, or to
    all. ``softcap`` is c of ``c * tanh(score / c)`` (Gemma 2, arXiv 2408.00118).
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window={self.window}: a query sees at least itself, so a window is 1 or more, or None")
        if self.softcap is not None and self.softcap <= 0:
            raise ConfigError(f"softcap={self.softcap} must be positive, or None for no cap")


def attention_forward(
    q: Float[Tensor, "n q_heads head_dim"],
    k: Float[Tensor, "n kv_heads head_dim"],
    v: Float[Tensor, "n kv_heads head_dim"],
    cu_seqlens: Int[Tensor, " n_sequences_plus_1"],
    options: AttentionOptions,
    forks: Sequence[Fork] = (),
) -> tuple[Float[Tensor, "n q_heads head_dim"], Float[Tensor, "q_heads n"]]:
    """Return causal softmax attention within each packed sequence, and the log of each query's softmax sum (float32).

    Sequence i holds the tokens ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``; a batch (b, t) of whole rows is
    ``arange(0, b * t + 1, t)``. Query head h reads key head ``h // (q_heads // kv_heads)``. Softmax is in float32. The
    backward needs q, k, v and these two outputs (Dao 2023, arXiv 2307.08691). Only the last axis must be contiguous.
    Sequences among the branches of ``forks`` see the stems that they continue.

    Raises ShapeError if shapes or cu_seqlens do not fit.
    """
    _check(q, k, v, cu_seqlens)
    kernel = implementation("attention.attention_forward", q.device, options.backend)
    numbers = _numbers(q, options)
    out, lse = kernel(q, k, v, cu_seqlens, *numbers)
    if forks:
        join_stems((q, k, v), out, lse, forks, cu_seqlens.tolist(), ScoreForm(*numbers))
    return out, lse


def attention_backward(
    dout: Float[Tensor, "n q_heads head_dim"],
    qkv: tuple[Tensor, Tensor, Tensor],
    forward: tuple[Float[Tensor, "n q_heads head_dim"], Float[Tensor, "q_heads n"]],
    cu_seqlens: Int[Tensor, " n_sequences_plus_1"],
    options: AttentionOptions,
    forks: Sequence[Fork] = (),
) -> tuple[
    Float[Tensor, "n q_heads head_dim"], Float[Tensor, "n kv_heads head_dim"], Float[Tensor, "n kv_heads head_dim"]
]:
    """Return (dq, dk, dv) from the inputs and outputs of `attention_forward`."""
    kernel = implementation("attention.attention_backward", dout.device, options.backend)
    numbers = _numbers(qkv[0], options)
    dq, dk, dv = kernel(dout, *qkv, *forward, cu_seqlens, *numbers)
    if forks:
        add_stem_gradients(dout, qkv, forward, (dq, dk, dv), forks, cu_seqlens.tolist(), ScoreForm(*numbers))
    return dq, dk, dv


def _numbers(q: Tensor, options: AttentionOptions) -> tuple[float, int, float]:
    """Return scale, window and cap in the kernels' form, where 0 means no window or no cap."""
    scale = q.shape[-1] ** -0.5 if options.scale is None else options.scale
    return scale, options.window or 0, options.softcap or 0.0


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> None:
    fits = (
        q.ndim == k.ndim == 3
        and k.shape == v.shape
        and q.shape[0] == k.shape[0]
        and q.shape[2] == k.shape[2]
        and k.shape[1] > 0
        and q.shape[1] % k.shape[1] == 0
        and q.dtype == k.dtype == v.dtype
    )
    if not fits:
        raise ShapeError(
            "attention takes q (n, q_heads, d), k and v (n, kv_heads, d) of one dtype, q_heads a multiple of kv_heads; "
            f"given q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}, v {tuple(v.shape)} {v.dtype}"
        )
    bounds = cu_seqlens.tolist()
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != q.shape[0] or any(a > b for a, b in pairwise(bounds)):
        raise ShapeError(f"cu_seqlens must rise from 0 to the {q.shape[0]} tokens of q; given {bounds}")
