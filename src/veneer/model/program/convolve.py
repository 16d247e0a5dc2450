"""Short convolution over the last tokens of a sequence, between two gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from veneer.model.blueprint.parts import ShortConv
from veneer.model.program.acting import Acting, is_plain
from veneer.model.program.binding import Binding
from veneer.model.program.operation import Frame, PassKind, Register, Window
from veneer.model.program.rows import PassRows
from veneer.model.program.stretch import ActingStretch, Keep, Kept, Tape, Trained
from veneer.ops.cpu.step import StepProgram
from veneer.ops.state.conv import LONGEST, ConvKernel, GatedInput, conv_backward, conv_forward, previous_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Convolve(Trained):
    """Convolution: ``target = c · conv(b · x)``, where ``source`` (n, 3 · width) holds b, c and x.

    ``layer`` is the index of this convolution in the pages, which store the inputs of earlier tokens. In training a
    token reads inputs of its own sequence alone. The output is computed again in the backward pass.
    """

    cheap = True

    layer: int
    part: ShortConv
    source: Register
    target: Register

    @property
    def state(self) -> Window:
        return Window(self.part.width)

    def bind(self, to: Binding) -> ConvKernel:
        held = to.model.get_submodule(self.part.conv)._parameters
        return ConvKernel(cast(Tensor, held["weight"])[:, 0], held["bias"])

    def forward(self, weights: ConvKernel, rows: PassRows, frame: Frame) -> None:
        [source] = self.source.read(frame)
        self.target.write(frame, [rows.cache.convolve(self.layer, _gated(source), weights, rows.rows)])

    def emit(self, weights: ConvKernel, step: StepProgram) -> bool:
        if self.part.kernel > LONGEST:
            return False
        sizes = [self.part.width, self.part.kernel, self.layer]
        step.add("conv", *sizes, *weights.values(), step.first_of(self.source), step.first_of(self.target))
        return True

    def fits(self, kind: PassKind) -> bool:
        return kind.in_pages

    @property
    def gives_output(self) -> bool:
        return True

    def acting(self, at: Acting) -> ConvKernel | None:
        return acting_kernel(at, self.part.conv)

    def train(self, weights: ConvKernel, run: ActingStretch, frame: Frame, keep: Keep) -> Kept:
        self.target.write(frame, [conv_forward(_gated(self.source.read(frame)[0]), weights, previous_of(run))])
        return ()

    def back(self, weights: ConvKernel, tape: Tape) -> Tensor:
        """Add the gradient of the source to the tape, and return the operation's output, which is computed again.

        The output is written over its own gradient. If the source was itself computed again, its memory is overwritten
        too.
        """
        [dy], [source], again = tape.take(self.target), tape.value(self.source), tape.run.again
        found, y = conv_backward(dy, _gated(source), weights, previous_of(tape.run), owns_dy=True, owns_inputs=again)
        joined = source if again else torch.cat([cast(Tensor, found.before), cast(Tensor, found.after), found.x], dim=1)
        tape.give(self.source, [joined])
        return y


def _gated(source: Tensor) -> GatedInput:
    before, after, x = source.chunk(3, dim=1)
    return GatedInput(x, before, after)


def acting_kernel(at: Acting, path: str, activation: str = "identity") -> ConvKernel | None:
    """Return the kernel of a convolution of a block, or None if it is hooked, trained or replaced."""
    module = at.module(path)
    if type(module) is not nn.Conv1d or not is_plain(module):
        return None
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    if any(held is not None and held.requires_grad for held in (weight, bias)):
        return None
    return ConvKernel(cast(Tensor, weight)[:, 0], bias, activation)


def previous_of(run: ActingStretch) -> Tensor:
    """Return, for each row of a pass, the index of the row before it in its sequence, as `previous_rows` does."""
    return previous_rows(run.positions.cu_seqlens, run.positions.forks)
