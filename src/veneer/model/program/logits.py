"""End of the residual stream: computes logits of the rows that need them, and the likeliest tokens of other rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.model.blueprint.decoder import Head
from veneer.model.blueprint.parts import Linear, Norm
from veneer.model.program.binding import Binding
from veneer.model.program.linears import Linears, each_alone
from veneer.model.program.norm import NormWeights
from veneer.model.program.operation import Frame, Operation, Register, StepPlace
from veneer.model.program.rows import PassRows
from veneer.model.program.version import Version
from veneer.ops.cpu.step import StepProgram, layer_parts, norm_parts
from veneer.ops.grouped_low_rank import AdapterRuns
from veneer.ops.packed import BLOCK
from veneer.ops.sample import likeliest
from veneer.records.token_rows import project_rows

LOGIT_BYTES = 1 << 25
"""Of logits at a time: 340 rows of 49,152 in 16 bits, 110 of 151,936."""


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """Norm and head of a model."""

    head: Head
    norm: NormWeights | None
    linears: Linears

    def of(self, h: Tensor, rows: Tensor, runs: AdapterRuns, versions: tuple[str, ...]) -> Tensor:
        """Return the logits of some rows of the residual stream, in the dtype in which they are computed.

        ``runs`` say which adapter version each of these rows has.
        """
        y = self.uncapped(h, rows, runs, versions)
        return y if self.head.softcap is None else self.head.softcap * torch.tanh(y.float() / self.head.softcap)

    def uncapped(self, h: Tensor, rows: Tensor, runs: AdapterRuns, versions: tuple[str, ...]) -> Tensor:
        """Return the logits before their soft cap. The cap would not change their order."""
        x = self.hidden(h, rows, runs, versions)
        [y] = self.linears(x, versions, runs)
        for number, start, stop in runs.runs:
            own = self.linears.versions[versions[number]].effects.rows.get(self.head.linear.path)
            if own is not None:
                bias = self.linears.biases[0]
                y[start:stop] = project_rows(x[start:stop], y[start:stop], *own, bias, each_alone)
        return y.float() * self.head.scale if self.head.scale != 1 else y

    def hidden(self, h: Tensor, rows: Tensor, runs: AdapterRuns, versions: tuple[str, ...]) -> Tensor:
        """Return the hidden states of some rows of the residual stream, in the form that the head reads."""
        x = h[rows]
        return x if self.norm is None else self.norm(x, versions, runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Logits(Operation):
    """Logits of the ``kept`` rows of a pass: norm, head, scale and soft cap. They are computed when they are read."""

    read, written = ("stream",), ()

    norm: Norm | None
    head: Head
    stream: Register

    @property
    def layers(self) -> tuple[Linear, ...]:
        return (self.head.linear,)

    @property
    def norms(self) -> tuple[Norm, ...]:
        return () if self.norm is None else (self.norm,)

    def bind(self, to: Binding) -> HeadWeights:
        norm = None if self.norm is None else NormWeights(to.model, self.norm, to.versions)
        return HeadWeights(self.head, norm, to.linears(self.layers))

    def forward(self, weights: HeadWeights, rows: PassRows, frame: Frame) -> None:
        frame["logits"] = LogitRows(weights, frame[self.stream.name], rows)


class Pick(Logits):
    """Likeliest next tokens of the ``picked`` rows of a pass."""

    takes_blocks = False

    def forward(self, weights: HeadWeights, rows: PassRows, frame: Frame) -> None:
        if len(rows.picked):
            logits = weights.uncapped(frame[self.stream.name], rows.picked, rows.picked_runs, rows.versions)
            rows.tokens.copy_(likeliest(logits))

    def emit(self, weights: HeadWeights, step: StepProgram) -> bool:
        group, [bias] = weights.linears.group, weights.linears.biases
        norm = None if weights.norm is None else weights.norm.for_step()
        if group is None or not self.head.scale > 0 or (weights.norm is not None and norm is None):
            return False
        weight = group.parts[0]
        if weight.dtype != step.dtype or (bias is not None and bias.dtype != step.dtype):
            return False
        output_bytes = weight.nbytes // (weight.shape[0] + -weight.shape[0] % BLOCK)
        layer = layer_parts(weight, bias, -1)  # of its bias the step reads the rows' dtype alone
        step.add("head", norm_parts(norm), layer, output_bytes, step.first_of(self.stream), self.head.scale)
        return True

    def group(self, weights: HeadWeights) -> Linears:
        return weights.linears

    def take(self, weights: HeadWeights, version: Version, place: StepPlace) -> bool:
        known = weights.norm is None or weights.norm.take(version, place)
        return known and not version.effects.replaces(self.head.linear.path)


class LogitRows:
    """Rows of a pass whose logits (``kept``) or hidden states (``read``) are wanted. Both are computed on demand."""

    def __init__(self, of: HeadWeights, stream: Tensor, rows: PassRows) -> None:
        self._of, self._stream, self._rows = of, stream, rows

    @torch.no_grad()
    def hidden(self) -> Tensor:
        """Return the hidden states (read, width)."""
        rows = self._rows
        return self._of.hidden(self._stream, rows.read, rows.read_runs, rows.versions)

    def logits(self) -> Tensor:
        """Return all logits (kept, vocabulary), in float32."""
        return torch.cat([self._stream.new_empty(0, self._width).float(), *(each.float() for each in self.blocks())])

    def blocks(self) -> Iterator[Tensor]:
        """Yield the logits of the ``kept`` rows in order, in blocks of at most `LOGIT_BYTES`."""
        at_once = max(1, LOGIT_BYTES // (self._width * self._stream.itemsize))
        for first in range(0, len(self._rows.kept), at_once):
            yield self._block(first, min(first + at_once, len(self._rows.kept)))

    @torch.no_grad()
    def _block(self, first: int, stop: int) -> Tensor:
        rows = self._rows
        return self._of.of(self._stream, rows.kept[first:stop], rows.kept_runs.part(first, stop), rows.versions)

    @property
    def _width(self) -> int:
        return self._of.head.linear.out_features
