"""Activation of a feed-forward part, gated or not."""

from __future__ import annotations

from dataclasses import dataclass

from veneer.model.program.operation import Frame, Operation, Register
from veneer.model.program.rows import PassRows
from veneer.ops.activation import KINDS, activation_forward
from veneer.ops.cpu.step import StepProgram
from veneer.ops.glu import ACTIVATIONS as GATED
from veneer.ops.glu import glu_forward


@dataclass(frozen=True, slots=True, kw_only=True)
class Activate(Operation):
    """Activation: ``target = act(source)``, or ``act(gate) · up`` of two tensors of ``source``, or of its halves."""

    activation: str
    gated: bool
    source: Register
    target: Register

    def forward(self, weights: None, rows: PassRows, frame: Frame) -> None:
        ys = self.source.read(frame)
        if not self.gated:
            y = activation_forward(ys[0], self.activation)
        else:
            gate, up = ys if len(ys) == 2 else ys[0].chunk(2, -1)
            in_one = self.activation in GATED
            y = glu_forward(gate, up, self.activation) if in_one else activation_forward(gate, self.activation) * up
        frame[self.target.name] = y

    def emit(self, weights: None, step: StepProgram) -> bool:
        [width], source, target = self.target.widths, step.first_of(self.source), step.first_of(self.target)
        if self.gated and self.activation in GATED:
            up = (source + 1, 0) if len(self.source.widths) == 2 else (source, width)
            step.add("glu", GATED.index(self.activation), width, source, *up, target)
        elif not self.gated and self.activation in KINDS:
            step.add("activation", KINDS.index(self.activation), width, source, target)
        else:
            return False
        return True
