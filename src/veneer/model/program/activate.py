"""Activation of a feed-forward part, gated or not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.model.program.acting import Acting, is_plain
from veneer.model.program.operation import Frame, Register
from veneer.model.program.rows import PassRows
from veneer.model.program.stretch import ActingStretch, Keep, Kept, Tape, Trained
from veneer.ops.activation import KINDS, activation_backward, activation_forward
from veneer.ops.cpu.step import StepProgram
from veneer.ops.glu import ACTIVATIONS as GATED
from veneer.ops.glu import glu_backward, glu_forward


@dataclass(frozen=True, slots=True, kw_only=True)
class Activate(Trained):
    """Activation: ``target = act(source)``, or ``act(gate) · up`` of two tensors of ``source``, or of its halves.

    ``path`` is the module that computes ``act``. A gated activation computes its output again in the backward pass.
    """

    cheap = True

    path: str
    activation: str
    gated: bool
    source: Register
    target: Register

    def forward(self, weights: None, rows: PassRows, frame: Frame) -> None:
        ys = self.source.read(frame)
        if not self.gated:
            y = activation_forward(ys[0], self.activation)
        else:
            gate, up = _gate_and_up(ys)
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

    @property
    def untrained(self) -> str | None:
        known = not self.gated or self.activation in GATED
        return None if known else f"its feed-forward half is gated by {self.activation}, which has no backward pass"

    @property
    def gives_output(self) -> bool:
        return self.gated

    def acting(self, at: Acting) -> tuple[()] | None:
        return () if is_plain(at.module(self.path)) else None

    def train(self, weights: tuple[()], run: ActingStretch, frame: Frame, keep: Keep) -> Kept:
        ys = self.source.read(frame)
        ungated = () if self.gated else (activation_forward(ys[0], self.activation),)
        self.target.write(frame, ungated or [glu_forward(*_gate_and_up(ys), self.activation)])
        return ()

    def back(self, weights: tuple[()], tape: Tape) -> Tensor | None:
        """Add the gradients of the sources to the tape. Return the output if the activation is gated, otherwise None.

        A gated activation's output is computed again and written over its own gradient. Its sources are overwritten if
        they were themselves computed again.
        """
        [dy], ys = tape.take(self.target), tape.value(self.source)
        if not self.gated:
            tape.give(self.source, [activation_backward(dy, ys[0], self.activation)])
            return None
        again, (gate, up) = tape.run.again, _gate_and_up(ys)
        dgate, dup, y = glu_backward(dy, gate, up, self.activation, owns_dh=True, owns_inputs=again)
        if len(ys) == 2:
            tape.give(self.source, [dgate, dup])
        else:
            tape.give(self.source, [ys[0] if again else torch.cat([dgate, dup], dim=-1)])
        return y


def _gate_and_up(ys: list[Tensor]) -> tuple[Tensor, Tensor]:
    gate, up = ys if len(ys) == 2 else ys[0].chunk(2, dim=-1)
    return gate, up
