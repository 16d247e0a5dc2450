"""Attention to the pages of a sequence: heads are clipped, normed, rotated and appended, and queries attend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.model.blueprint.heads import HeadLayout
from veneer.model.blueprint.parts import Attention
from veneer.model.program.binding import Binding
from veneer.model.program.norm import NormWeights
from veneer.model.program.operation import Frame, Keys, Operation, PassKind, Register
from veneer.model.program.rows import PassRows
from veneer.ops.cpu.step import StepProgram, norm_parts
from veneer.ops.rotary import rotate


@dataclass(frozen=True, slots=True)
class AttendWeights:
    """Norms of queries and keys, and the cosines and sines by position."""

    q_norm: NormWeights | None
    k_norm: NormWeights | None
    turns: tuple[Tensor, Tensor] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attend(Operation):
    """Attention of the heads in ``source`` to the pages of their sequences, as ``target`` (n, heads · width).

    ``layer`` is the index of their keys and values in a page.
    """

    layer: int
    attention: Attention
    source: Register
    target: Register

    @property
    def state(self) -> Keys:
        return Keys(self.attention.heads.n_kv_heads, self.attention.heads.head_dim)

    def bind(self, to: Binding) -> AttendWeights:
        part = self.attention
        q_norm, k_norm = (None if n is None else NormWeights(to.model, n, {}) for n in (part.q_norm, part.k_norm))
        return AttendWeights(q_norm, k_norm, None if part.rotary is None else to.turns[part.rotary])

    def forward(self, weights: AttendWeights, rows: PassRows, frame: Frame) -> None:
        q, k, v = self._heads(weights, rows, self.source.read(frame))
        rows.cache.append(self.layer, k, v, rows.rows)
        if rows.written is not None:
            rows.written.append((k.clone(), v.clone()))  # their memory may be the next layer's too
        frame[self.target.name] = rows.cache.attend(self.layer, q, rows.rows, self.attention)

    def _heads(self, weights: AttendWeights, rows: PassRows, ys: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        part = self.attention
        if part.clip is not None:
            ys = [y.clamp_(-part.clip, part.clip) for y in ys]
        q, k, v = part.heads.split(ys)
        q, k = _normed(weights.q_norm, q), _normed(weights.k_norm, k)
        if part.rotary is not None and weights.turns is not None:
            cos, sin = rows.turns(weights.turns, part.rotary)
            q, k = (_rotated(x, cos, sin, part.rotary.interleaved) for x in (q, k))
        if part.temperature is not None:
            turns = torch.floor(rows.positions / part.temperature.original_max_positions)
            q = q * (1 + part.temperature.beta * torch.log1p(turns))[:, None, None].to(q.dtype)
        return q, k, v

    def emit(self, weights: AttendWeights, step: StepProgram) -> bool:
        part, heads, rotary = self.attention, self.attention.heads, self.attention.rotary
        plain = part.clip is None and part.temperature is None and not part.alibi
        if not plain or any(len(norm.shape) > 1 for norm in part.norms):
            return False
        norms = [None if norm is None else norm.for_step() for norm in (weights.q_norm, weights.k_norm)]
        half, interleaved = (0, False) if rotary is None else (-(-rotary.dim // 2), rotary.interleaved)
        step.add(
            "attention",
            [self.layer, heads.n_heads, heads.n_kv_heads, heads.head_dim, half],
            _places(heads, step.first_of(self.source)),
            *map(norm_parts, norms),
            step.table_of(rotary),
            interleaved,
            part.scale,
            part.window or 0,
            part.softcap or 0.0,
            step.first_of(self.target),
        )
        return True

    def fits(self, kind: PassKind) -> bool:
        return kind.in_pages


def _normed(norm: NormWeights | None, heads: Tensor) -> Tensor:
    """Normed heads (n, heads, d): each head by itself, or all at once."""
    if norm is None:
        return heads
    over_all = len(norm.norm.shape) == 1 and norm.norm.shape[0] != heads.shape[-1]
    x = heads.flatten(1) if over_all else heads
    return norm.normed(x, *norm.own).view(heads.shape)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return rotate(heads.transpose(0, 1)[None], cos, sin, interleaved=interleaved, in_place=True)[0].transpose(0, 1)


def _places(layout: HeadLayout, first: int) -> list[list[int]]:
    """Of queries, keys and values the tensor, the index of the first value in it, and the stride between heads.

    The tensors are those from ``first`` on; the heads lie as `HeadLayout.split` splits them.
    """
    d = layout.head_dim
    if layout.order == "apart":
        return [[first, 0, d], [first + 1, 0, d], [first + 2, 0, d]]
    if layout.order == "by head":
        return [[first, 0, 3 * d], [first, d, 3 * d], [first, 2 * d, 3 * d]]
    keys, values = layout.n_heads * d, (layout.n_heads + layout.n_kv_heads) * d
    return [[first, 0, d], [first, keys, d], [first, values, d]]
