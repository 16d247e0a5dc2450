"""Causal attention for training: grouped heads, packed sequences, windows, soft caps, ALiBi, O(n) memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor
from torch.nn.functional import pad

from veneer.errors import ConfigError, ShapeError
from veneer.ops.dispatch import implementation
from veneer.ops.forks import Fork, ScoreForm, add_stem_gradients, join_stems

BASE = 256  # of the digits of positions: both 16-bit dtypes hold every one, times the base too
N_PARTS = 3  # of a slope in 16 bits: as exact as float32


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOptions:
    """Options of attention: scale, window and soft cap of the scores.

    ``scale`` multiplies q·k; if it is None, 1/√head_dim does. A query attends to itself and ``window - 1`` tokens
    before it, or to all if ``window`` is None. ``softcap`` is c of ``c * tanh(score / c)`` (Gemma 2, arXiv 2408.00118).
    ``slopes``, one for each query head, add ``-slope · distance`` to the scores (ALiBi). They exclude ``softcap``.
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    slopes: tuple[float, ...] | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window={self.window}: a query sees at least itself, so a window is 1 or more, or None")
        if self.softcap is not None and self.softcap <= 0:
            raise ConfigError(f"softcap={self.softcap} must be positive, or None for no cap")
        if self.softcap is not None and self.slopes is not None:
            raise ConfigError(f"softcap={self.softcap} caps scores that have a bias (slopes): leave one of them out")


def alibi_slopes(n_heads: int) -> tuple[float, ...]:
    """Return ALiBi's slope for each head (arXiv 2108.12409): 2^(-8 i / n) for i = 1 to n.

    n is the largest power of two up to ``n_heads``. Further heads take the slopes between: 2^(-4 i / n) for odd i.
    """
    n = 2 ** math.floor(math.log2(n_heads))
    between = (2.0 ** (-4 * i / n) for i in range(1, 2 * (n_heads - n), 2))
    return (*(2.0 ** (-8 * i / n) for i in range(1, n + 1)), *between)


def attention_forward(
    q: Float[Tensor, "n q_heads head_dim"],
    k: Float[Tensor, "n kv_heads head_dim"],
    v: Float[Tensor, "n kv_heads head_dim"],
    cu_seqlens: Int[Tensor, " n_sequences_plus_1"],
    options: AttentionOptions,
    forks: Sequence[Fork] = (),
    sinks: Float32[Tensor, " q_heads"] | None = None,
) -> tuple[Float[Tensor, "n q_heads head_dim"], Float[Tensor, "q_heads n"]]:
    """Return causal softmax attention within each packed sequence, and the log of each query's softmax sum (float32).

    Sequence i holds the tokens ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``; a batch (b, t) of whole rows is
    ``arange(0, b * t + 1, t)``. Query head h reads key head ``h // (q_heads // kv_heads)``. Softmax is in float32. The
    backward needs q, k, v and these two outputs (Dao 2023, arXiv 2307.08691). Only the last axis must be contiguous.
    A sequence within the ``branches`` of a `Fork` also attends to that fork's ``stem``. ``sinks`` are a logit of each
    query head: one more term of its softmax's sum, without a value (gpt-oss, arXiv 2508.10925, section 2.2). The
    backward pass reads them from the two outputs; they get no gradient, and exclude the options' slopes.

    Raises ShapeError if shapes or cu_seqlens do not fit, and ConfigError for sinks beside slopes.
    """
    _check(q, k, v, cu_seqlens)
    if sinks is not None:
        check_sinks(sinks, q)
        if options.slopes is not None:
            raise ConfigError("slopes shift a query's scores, which sinks do not follow: leave one of them out")
    kernel = implementation("attention.attention_forward", q.device, options.backend)
    numbers, width = _numbers(q, options), q.shape[-1]
    qkv = _biased((q, k, v), cu_seqlens, options, forks)
    out, lse = kernel(*qkv, cu_seqlens, *numbers)
    if forks:
        join_stems(qkv, out, lse, forks, cu_seqlens.tolist(), ScoreForm(*numbers))
    if sinks is not None:
        out, lse = _with_sinks(out, lse, sinks)
    return out if options.slopes is None else out[..., :width].contiguous(), lse


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs and logs of sums of softmaxes that have the sinks as one more term."""
    share = torch.sigmoid(lse - sinks[:, None])  # of all other terms in the sum
    return (out * share.T[..., None]).to(out.dtype), torch.logaddexp(lse, sinks[:, None])


def check_sinks(sinks: Tensor, q: Tensor) -> None:
    """Raise ShapeError if sinks are not one float32 number for each head of q (n, heads, head_dim)."""
    if sinks.shape != (q.shape[1],) or sinks.dtype != torch.float32 or not sinks.is_contiguous():
        raise ShapeError(
            f"sinks must be contiguous float32 of ({q.shape[1]},), one for each query head; given "
            f"{tuple(sinks.shape)} {sinks.dtype}"
        )


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
    numbers, (out, lse), width = _numbers(qkv[0], options), forward, qkv[0].shape[-1]
    qkv = _biased(qkv, cu_seqlens, options, forks)
    if options.slopes is not None:
        dout, out = (pad(x, (0, qkv[0].shape[-1] - width)) for x in (dout, out))
    dq, dk, dv = kernel(dout, *qkv, out, lse, cu_seqlens, *numbers)
    if forks:
        add_stem_gradients(dout, qkv, (out, lse), (dq, dk, dv), forks, cu_seqlens.tolist(), ScoreForm(*numbers))
    if options.slopes is not None:
        dq, dk, dv = (x[..., :width].contiguous() for x in (dq, dk, dv))
    return dq, dk, dv


def _biased(
    qkv: tuple[Tensor, Tensor, Tensor], cu_seqlens: Tensor, options: AttentionOptions, forks: Sequence[Fork]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values. If ALiBi's ``slopes`` are given, each head gets further features whose products
    are the bias of the scores (`_with_slopes`).
    """
    if options.slopes is None:
        return qkv
    return _with_slopes(qkv, options.slopes, _numbers(qkv[0], options)[0], cu_seqlens.tolist(), forks)


def _with_slopes(
    qkv: tuple[Tensor, Tensor, Tensor],
    slopes: Sequence[float],
    scale: float,
    bounds: Sequence[int],
    forks: Sequence[Fork],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values with further features. In queries and keys, their scaled products are ALiBi's
    bias; in values they are zero.

    The bias of query i on key j is -slope · (i - j). Softmax does not change if slope · i is added to all scores of
    query i, so that slope · j remains. Queries hold the slopes and keys hold the positions. 16 bits hold neither
    exactly: positions are split into digits, slopes into summands. ``bounds`` are those of the sequences; positions
    begin at 0, or, in a branch of a fork, after its stem.
    """
    q, k, v = qkv
    tilts, places = _parts(slopes, scale, q), _digits(_positions(bounds, forks), k)
    tilt = torch.stack([part for _ in places for part in tilts], dim=-1)
    place = torch.stack([digit for digit in places for _ in tilts], dim=-1)
    return (
        torch.cat([q, tilt.expand(len(q), -1, -1)], dim=-1),
        torch.cat([k, place[:, None].expand(-1, k.shape[1], -1)], dim=-1),
        pad(v, (0, tilt.shape[-1])),
    )


def _positions(bounds: Sequence[int], forks: Sequence[Fork]) -> Tensor:
    lengths = torch.tensor(bounds).diff()
    positions = torch.arange(bounds[-1]) - torch.tensor(bounds[:-1]).repeat_interleave(lengths)
    for fork in forks:
        positions[fork.branches] += fork.stem.stop - fork.stem.start
    return positions


def _parts(slopes: Sequence[float], scale: float, q: Tensor) -> list[Tensor]:
    """Return tensors (heads,) in the dtype of q that add up to slope / scale."""
    rest, found = torch.tensor(slopes, dtype=torch.float64) / scale, []
    for _ in range(N_PARTS if q.dtype.itemsize < 4 else 1):
        found.append(rest.to(q.dtype))
        rest = rest - found[-1].double()
    return [part.to(q.device) for part in found]


def _digits(positions: Tensor, k: Tensor) -> list[Tensor]:
    """Return tensors (n,) in the dtype of k that add up to the positions."""
    if k.dtype.itemsize >= 4:
        return [positions.to(k.device, k.dtype)]
    low = positions % BASE
    return [digit.to(k.device, k.dtype) for digit in (low, positions - low)]


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
