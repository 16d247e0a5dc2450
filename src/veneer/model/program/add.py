"""Operation that adds the output of a half block to the residual stream, after the bottlenecks of adapter versions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor

from veneer.model.program.acting import Acting
from veneer.model.program.binding import Binding
from veneer.model.program.operation import Frame, Register, StepPlace
from veneer.model.program.rows import PassRows
from veneer.model.program.stretch import ActingStretch, Keep, Kept, Tape, Trained
from veneer.model.program.version import Version, Versions
from veneer.ops.cpu.step import StepProgram


@dataclass(frozen=True, slots=True, kw_only=True)
class Add(Trained):
    """Addition to the residual stream: ``stream += multiplier · source``.

    Bottlenecks at the sub-layer ``site`` first change ``source``. They read ``source``, or the half block's input
    ``beside``. In training, this operation is left out of a half with bottlenecks, and the block adds the half's output
    itself.
    """

    trains_on, needed = ("source", "stream"), ()
    read = ("source", "beside", "stream")
    written = ("source", "stream")

    site: str
    source: Register
    beside: Register
    stream: Register
    multiplier: float = 1.0

    def bind(self, to: Binding) -> Versions:
        return to.versions

    def forward(self, weights: Versions, rows: PassRows, frame: Frame) -> None:
        half = changed(self.site, weights, rows, frame[self.source.name], frame[self.beside.name])
        frame[self.stream.name] = frame[self.stream.name] + (half if self.multiplier == 1 else half * self.multiplier)

    def emit(self, weights: Versions, step: StepProgram) -> bool:
        [width], half = self.stream.widths, step.first_of(self.source)
        step.add("change", width, step.first_of(self.beside), half)
        step.add("sum", width, self.multiplier, half, step.first_of(self.stream))
        return True

    def take(self, weights: Versions, version: Version, place: StepPlace) -> bool:
        return take_bottleneck(self.site, version, place)

    def acting(self, at: Acting) -> tuple[()]:
        return ()

    def train(self, weights: tuple[()], run: ActingStretch, frame: Frame, keep: Keep) -> Kept:
        """Add the source to the residual stream. The sum overwrites the source if both have the same dtype."""
        [half], [h] = self.source.read(frame), self.stream.read(frame)
        half = half if self.multiplier == 1 else half.mul_(self.multiplier)
        y = half.add_(h) if half.dtype == h.dtype else h + half
        self.stream.write(frame, [y])
        return (y,) if keep.output else ()

    def kept_output(self, weights: tuple[()], kept: Kept) -> list[Tensor] | None:
        return [cast(Tensor, y) for y in kept] or None

    def back(self, weights: tuple[()], tape: Tape) -> None:
        [dy] = tape.take(self.stream)
        half = dy.to(tape.run.dtype)
        tape.give(self.stream, [dy])
        tape.give(self.source, [half if self.multiplier == 1 else half * self.multiplier])


def changed(site: str, versions: Versions, rows: PassRows, half: Tensor, beside: Tensor) -> Tensor:
    """Apply bottlenecks to the output ``half`` (n, d) of a half block, in place, and return it. ``beside`` (n, d) is
    the half block's input.
    """
    for number, start, stop in rows.runs.runs:
        bottleneck = versions[rows.versions[number]].bottlenecks.get(site)
        if bottleneck is not None:
            own = slice(start, stop)
            bottleneck.change((half if bottleneck.reads_output else beside)[own], half[own])
    return half


def take_bottleneck(site: str, version: Version, place: StepPlace) -> bool:
    """Add a version's bottleneck after the sub-layer ``site`` to the program in C++. Return False if the C++ code does
    not support it.
    """
    bottleneck = version.bottlenecks.get(site)
    if bottleneck is not None and bottleneck.pairs is not None:
        place.step.take_bottleneck(place.version, place.at, bottleneck.pairs, reads_output=bottleneck.reads_output)
    return bottleneck is None or bottleneck.pairs is not None
