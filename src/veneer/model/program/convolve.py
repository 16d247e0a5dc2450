"""Short convolution over the last tokens of a sequence, between two gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from veneer.errors import DescriptionError
from veneer.model.blueprint.parts import ShortConv
from veneer.model.program.acting import Acting, is_plain
from veneer.model.program.operation import Frame, Register
from veneer.model.program.rows import PassRows
from veneer.model.program.stretch import ActingStretch, Keep, Kept, Tape, Trained
from veneer.ops.state.conv import ConvKernel, GatedInput, conv_backward, conv_forward, previous_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Convolve(Trained):
    """Convolution: ``target = c · conv(b · x)``, where ``source`` (n, 3 · width) holds b, c and x.

    In training a token sees those of its own sequence alone. The output is computed again in the backward pass.
    """

    cheap = True

    part: ShortConv
    source: Register
    target: Register

    def forward(self, weights: None, rows: PassRows, frame: Frame) -> None:
        raise DescriptionError(f"{self.part.path} keeps the last tokens of a sequence, and pages hold keys and values")

    @property
    def gives_output(self) -> bool:
        return True

    def acting(self, at: Acting) -> ConvKernel | None:
        module = at.module(self.part.conv)
        if type(module) is not nn.Conv1d or not is_plain(module):
            return None
        weight, bias = module._parameters["weight"], module._parameters["bias"]
        if any(held is not None and held.requires_grad for held in (weight, bias)):
            return None
        return ConvKernel(cast(Tensor, weight)[:, 0], bias)

    def train(self, weights: ConvKernel, run: ActingStretch, frame: Frame, keep: Keep) -> Kept:
        self.target.write(frame, [conv_forward(_gated(self.source.read(frame)[0]), weights, _previous(run))])
        return ()

    def back(self, weights: ConvKernel, tape: Tape) -> Tensor:
        """Return the recomputed output, in its gradient's memory. A recomputed source is overwritten."""
        [dy], [source], again = tape.take(self.target), tape.value(self.source), tape.run.again
        found, y = conv_backward(dy, _gated(source), weights, _previous(tape.run), owns_dy=True, owns_inputs=again)
        joined = source if again else torch.cat([cast(Tensor, found.before), cast(Tensor, found.after), found.x], dim=1)
        tape.give(self.source, [joined])
        return y


def _gated(source: Tensor) -> GatedInput:
    before, after, x = source.chunk(3, dim=1)
    return GatedInput(x, before, after)


def _previous(run: ActingStretch) -> Tensor:
    return previous_rows(run.positions.cu_seqlens, run.positions.forks)
