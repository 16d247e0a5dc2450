"""Operation that multiplies and adds to the residual stream in one call, unless a version changes the
product before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.model.blueprint.parts import Linear
from veneer.model.program.add import Add, changed, take_bottleneck
from veneer.model.program.binding import Binding
from veneer.model.program.linears import Linears, divided
from veneer.model.program.operation import Frame, Operation, Register, StepPlace
from veneer.model.program.product import Product, add_product
from veneer.model.program.rows import PassRows
from veneer.model.program.version import Version
from veneer.ops.cpu.step import StepProgram


@dataclass(frozen=True, slots=True, kw_only=True)
class IntoStream(Operation):
    """Linear layer without a bias, added to the residual stream: ``stream += W source``.

    Bottlenecks at the sub-layer ``site`` change the layer's output before it is added. They read that output, or the
    register ``beside``, the input of the half block.
    """

    read = ("source", "beside", "stream")
    written = ("stream",)

    linear: Linear
    site: str
    source: Register
    beside: Register
    stream: Register

    @property
    def layers(self) -> tuple[Linear, ...]:
        return (self.linear,)

    @property
    def alone(self) -> tuple[Operation, ...]:
        half = Register("half", self.stream.widths)
        return (
            Product(linears=self.layers, source=self.source, target=half),
            Add(site=self.site, source=half, beside=self.beside, stream=self.stream),
        )

    def bind(self, to: Binding) -> Linears:
        return to.linears(self.layers)

    def forward(self, weights: Linears, rows: PassRows, frame: Frame) -> None:
        given = (frame[register.name] for register in (self.stream, self.source, self.beside))
        frame[self.stream.name] = self._sum(weights, rows, *given)

    def _sum(self, linears: Linears, rows: PassRows, h: Tensor, x: Tensor, beside: Tensor) -> Tensor:
        if not linears.adds():
            return self._apart(linears, rows, h, x, beside)
        apart = tuple(self.site in linears.versions[v].bottlenecks or not linears.adds(v) for v in rows.versions)
        if not any(apart):
            return linears.onto(h, x, rows.versions, rows.runs)
        if not h.is_cpu:  # as in `Linears`
            return self._apart(linears, rows, h, x, beside)
        plain, others = divided(rows.runs, apart)
        if not len(plain.rows):
            return self._apart(linears, rows, h, x, beside)
        out = torch.empty_like(h)
        out[plain.rows] = linears.onto(h[plain.rows], x[plain.rows], rows.versions, plain.runs)
        given = (part[others.rows] for part in (h, x, beside))
        out[others.rows] = self._apart(linears, replace(rows, runs=others.runs), *given)
        return out

    def _apart(self, linears: Linears, rows: PassRows, h: Tensor, x: Tensor, beside: Tensor) -> Tensor:
        [half] = linears(x, rows.versions, rows.runs)
        return h + changed(self.site, linears.versions, rows, half, beside)

    def emit(self, weights: Linears, step: StepProgram) -> bool:
        return add_product(weights, step, self.source, self.stream, self.beside)

    def group(self, weights: Linears) -> Linears:
        return weights

    def take(self, weights: Linears, version: Version, place: StepPlace) -> bool:
        return take_bottleneck(self.site, version, place)
