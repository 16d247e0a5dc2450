"""Attention to the pages of a sequence: heads are clipped, normed, rotated and appended, and queries attend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from veneer.model.blueprint.heads import HeadLayout
from veneer.model.blueprint.parts import Attention
from veneer.model.blueprint.read_attention import window_of
from veneer.model.program.acting import Acting, ActingNorm
from veneer.model.program.binding import Binding
from veneer.model.program.norm import NormWeights
from veneer.model.program.operation import Frame, Keys, PassKind, Register
from veneer.model.program.rows import PassRows
from veneer.model.program.stretch import ActingStretch, Keep, Kept, Tape, Trained
from veneer.ops.attention import AttentionOptions, alibi_slopes, attention_backward, attention_forward
from veneer.ops.cpu.step import StepProgram, norm_parts
from veneer.ops.rotary import rotate_both

Heads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class AttendWeights:
    """Norms of queries and keys, cosines and sines of the rotation by position (``turns``), the bias of scores (heads,
    positions) and the sinks of the softmax (heads,), in float32. Each is None if attention has none.
    """

    q_norm: NormWeights | None
    k_norm: NormWeights | None
    turns: tuple[Tensor, Tensor] | None
    bias: Tensor | None
    sinks: Tensor | None


@dataclass(frozen=True, slots=True)
class AttendTraining:
    """Norms of queries and keys, options of the attention kernels with the window that the attention module has now,
    and the sinks of the softmax (heads,) in float32.
    """

    q_norm: ActingNorm | None
    k_norm: ActingNorm | None
    options: AttentionOptions
    sinks: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attend(Trained):
    """Attention of the heads in ``source`` to the stored keys of their sequences, written to ``target`` (n, heads ·
    width).

    ``layer`` is the layer's index in the pages that store keys and values. In training the heads attend within their
    own sequence, without pages. The operation keeps its output for the backward pass. It also keeps queries, keys and
    values, unless its source is recomputed.
    """

    needed = ()

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
        turns = None if part.rotary is None else to.turns[part.rotary]
        sinks = _sinks(to.model.get_submodule, part)
        bias = None if part.alibi is None else to.biases[part.alibi]
        return AttendWeights(q_norm, k_norm, turns, bias, None if sinks is None else sinks.detach().float())

    def forward(self, weights: AttendWeights, rows: PassRows, frame: Frame) -> None:
        source = self.source.read(frame)
        gates = self.attention.heads.gates(source)
        q, k, v = self._heads(weights, source)
        rotary = self.attention.rotary if weights.turns is not None else None
        turns = None if rotary is None or weights.turns is None else rows.turns(weights.turns, rotary)
        if turns is not None and rotary is not None and rows.written is None and not self.attention.norms_after_rotary:
            rows.cache.append_turned(self.layer, (q, k, v), rows.rows, turns, interleaved=rotary.interleaved)
        else:
            if turns is not None and rotary is not None:
                rotate_both(_by_head(q), _by_head(k), turns[0], turns[1], interleaved=rotary.interleaved)
            if self.attention.norms_after_rotary:
                q, k = _normed(weights.q_norm, q), _normed(weights.k_norm, k)
            rows.cache.append(self.layer, k, v, rows.rows)
        if rows.written is not None:
            rows.written.append((k.clone(), v.clone()))  # their memory may be the next layer's too
        q = self._warmed(q, rows)
        attended = rows.cache.attend(self.layer, q, rows.rows, self.attention, (weights.bias, weights.sinks))
        frame[self.target.name] = attended if gates is None else attended * gates.sigmoid().flatten(1)

    def _heads(self, weights: AttendWeights, ys: list[Tensor]) -> Heads:
        part = self.attention
        if part.clip is not None:
            ys = [y.clamp_(-part.clip, part.clip) for y in ys]
        q, k, v = part.heads.split(ys)
        return (q, k, v) if part.norms_after_rotary else (_normed(weights.q_norm, q), _normed(weights.k_norm, k), v)

    def _warmed(self, q: Tensor, rows: PassRows) -> Tensor:
        """Return queries (n, heads, d), each times the temperature that depends on its row's position. Without
        temperatures, return them unchanged.
        """
        part = self.attention.temperature
        if part is None:
            return q
        turns = torch.floor(rows.positions / part.original_max_positions)
        return q * (1 + part.beta * torch.log1p(turns))[:, None, None].to(q.dtype)

    def emit(self, weights: AttendWeights, step: StepProgram) -> bool:
        part, heads, rotary = self.attention, self.attention.heads, self.attention.rotary
        plain = part.clip is None and part.temperature is None and heads.order != "gated"
        plain = plain and (part.alibi is None or part.softcap is None)  # the kernel has one or the other
        at_once = heads.order == "by group" and any(norm.shape != (heads.head_dim,) for norm in part.norms)
        if not plain or at_once or any(len(norm.shape) > 1 for norm in part.norms):
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
            part.norms_after_rotary,
            part.scale,
            part.window or 0,
            part.softcap or 0.0,
            weights.bias,
            0 if weights.bias is None else weights.bias.shape[1],
            weights.sinks,
            step.first_of(self.target),
        )
        return True

    def fits(self, kind: PassKind) -> bool:
        return kind.in_pages

    @property
    def untrained(self) -> str | None:
        part = self.attention
        special = {
            "clips queries, keys and values": part.clip is not None,
            "scales queries by their position": _grows(part),
            "adds a bias by position that is rounded": part.alibi is not None and part.alibi.rounded,
            "has norms with weights of their own for each head": any(len(norm.shape) != 1 for norm in part.norms),
        }
        return next((f"its attention {what}" for what, is_so in special.items() if is_so), None)

    def acting(self, at: Acting) -> AttendTraining | None:
        part = self.attention
        q_norm, k_norm = (None if norm is None else at.norm(norm) for norm in (part.q_norm, part.k_norm))
        if len(part.norms) != (q_norm is not None) + (k_norm is not None):
            return None
        sinks = _sinks(at.module, part)
        if sinks is not None and sinks.requires_grad:
            return None
        window = window_of(at.module(part.path))
        slopes = alibi_slopes(part.heads.n_heads) if part.alibi else None
        options = AttentionOptions(scale=part.scale, window=window, softcap=part.softcap, slopes=slopes)
        return AttendTraining(q_norm, k_norm, options, None if sinks is None else sinks.float())

    def train(self, weights: AttendTraining, run: ActingStretch, frame: Frame, keep: Keep) -> Kept:
        source = self.source.read(frame)
        gates = self.attention.heads.gates(source)
        gates = None if gates is None else gates.contiguous()  # kept alone, without the queries
        qkv, kept = self._turned(weights, run, source)
        at = run.positions
        attended, lse = attention_forward(*qkv, at.cu_seqlens, weights.options, at.forks, weights.sinks)
        self.target.write(frame, [_gated(attended, gates)])
        return (attended, gates, lse) if keep.source else (attended, gates, lse, *qkv, *kept)

    def kept_output(self, weights: AttendTraining, kept: Kept) -> list[Tensor]:
        return [_gated(cast(Tensor, kept[0]), kept[1])]

    def back(self, weights: AttendTraining, tape: Tape) -> None:
        [dy], (attended, gates, lse, *heads) = tape.take(self.target), cast("tuple[Tensor, ...]", tape.kept)
        if heads:
            qkv, kept = (heads[0], heads[1], heads[2]), tuple(heads[3:])
        else:
            qkv, kept = self._turned(weights, tape.run, tape.value(self.source))
        at, dout, dgates = tape.run.positions, dy.view(attended.shape), None
        if gates is not None:
            share = gates.sigmoid()
            dgates = dout * attended * share * (1 - share)
            dout = dout * share
        dq, dk, dv = attention_backward(dout, qkv, (attended, lse), at.cu_seqlens, weights.options, at.forks)
        del qkv, heads
        last, n_of_q = self.attention.norms_after_rotary, 0 if weights.q_norm is None else 2
        if not last:
            self._rotate(dq, dk, tape.run, inverse=True)
        dq = _unnormed(weights.q_norm, dq, kept[:n_of_q])
        dk = _unnormed(weights.k_norm, dk, kept[n_of_q:])
        if last:
            self._rotate(dq, dk, tape.run, inverse=True)
        tape.give(self.source, self.attention.heads.join((dq, dk, dv), dgates))

    def _turned(
        self, weights: AttendTraining, run: ActingStretch, ys: list[Tensor]
    ) -> tuple[Heads, tuple[Tensor, ...]]:
        """Split the layers' outputs ``ys`` into queries, keys and values, then norm and rotate queries and keys. Return
        these heads, and the tensors that the norms' backward passes need.

        If queries or keys have no norm before the rotation, they are rotated in place, which overwrites ``ys``.
        """
        last = self.attention.norms_after_rotary
        q, k, v = self.attention.heads.split(ys)
        if last:
            self._rotate(q, k, run)
        turned, kept = list[Tensor](), list[Tensor]()
        for heads, norm in ((q, weights.q_norm), (k, weights.k_norm)):
            if norm is not None:
                rows = _rows(heads, norm)
                normed, statistics = norm.forward(rows)
                kept += [rows, statistics]
                heads = normed.view(heads.shape)
            turned.append(heads)
        q, k = turned
        if not last:
            self._rotate(q, k, run)
        return (q, k, v), tuple(kept)

    def _rotate(self, q: Tensor, k: Tensor, run: ActingStretch, *, inverse: bool = False) -> None:
        """Rotate queries and keys (n, heads, d) in place."""
        cos, sin, part = run.positions.cos, run.positions.sin, self.attention.rotary
        if cos is not None and sin is not None and part is not None:
            q, k = (x.view(*run.size[:2], *x.shape[1:]).transpose(1, 2) for x in (q, k))
            rotate_both(q, k, cos, sin, interleaved=part.interleaved, inverse=inverse != part.backwards)


def _sinks(module: Callable[[str], nn.Module], part: Attention) -> Tensor | None:
    """Return the sinks of attention's softmax, or None if there are none. ``module`` returns the module at a path."""
    owner, _, name = part.sinks.rpartition(".")
    return module(owner)._parameters[name] if name else None


def _gated(attended: Tensor, gates: Tensor | None) -> Tensor:
    """Return the heads' outputs (n, heads · d), each times the sigmoid of its gate if there are gates."""
    return (attended if gates is None else attended * gates.sigmoid()).view(len(attended), -1)


def _rows(heads: Tensor, norm: ActingNorm) -> Tensor:
    """View heads (n, heads, d) as the rows that a norm acts on: each head, or all heads of a token at once."""
    return heads if len(norm.weight) == heads.shape[-1] else heads.reshape(len(heads), -1)


def _unnormed(norm: ActingNorm | None, grad: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
    """Return the gradient with respect to the input of a norm of heads, given that of its output. Without a norm, both
    are the same.
    """
    return grad if norm is None else norm.backward(_rows(grad, norm), *kept).view(grad.shape)


def _grows(attention: Attention) -> bool:
    """Return True if some positions within the model's context multiply queries by a temperature other than 1."""
    rotary, temperature = attention.rotary, attention.temperature
    return temperature is not None and (rotary is None or rotary.max_positions > temperature.original_max_positions)


def _normed(norm: NormWeights | None, heads: Tensor) -> Tensor:
    """Normalize heads (n, heads, d): each head by itself, or all at once."""
    if norm is None:
        return heads
    over_all = len(norm.norm.shape) == 1 and norm.norm.shape[0] != heads.shape[-1]
    x = heads.flatten(1) if over_all else heads
    return norm.normed(x, *norm.own).view(heads.shape)


def _by_head(heads: Tensor) -> Tensor:
    """View heads (n, heads, d) as one sequence (1, heads, n, d)."""
    return heads.transpose(0, 1)[None]


def _places(layout: HeadLayout, first: int) -> list[list[int]]:
    """Return where the heads of queries, keys and values lie in the layers' outputs, with the order that
    `HeadLayout.split` expects.

    Each of the three lists holds four numbers: the output's index (counted from ``first``), and the index of its first
    value; then the stride between heads of one key head, and that between the first heads of two key heads.
    """
    d, group = layout.head_dim, layout.group
    if layout.order == "apart":
        return [[first, 0, d, group * d], [first + 1, 0, d, d], [first + 2, 0, d, d]]
    if layout.order == "by group":
        apart = (group + 2) * d
        return [[first, 0, d, apart], [first, group * d, apart, apart], [first, (group + 1) * d, apart, apart]]
    keys, values = layout.n_heads * d, (layout.n_heads + layout.n_kv_heads) * d
    return [[first, 0, d, group * d], [first, keys, d, d], [first, values, d, d]]
