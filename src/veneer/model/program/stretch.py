"""Consecutive operations of a program as one autograd node (a *stretch*), up to an addition to the residual stream.

A node ends with the addition, so that its tensors are free before the next node's backward pass begins. The forward
pass asks each operation for the tensors that it keeps. The backward pass runs the operations from the last to the
first. Values that they need were kept, or are computed again.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.model.program.acting import Acting
from veneer.model.program.operation import STREAM, Frame, Operation, Register
from veneer.ops.forks import Fork
from veneer.ops.linear.layer import LinearLayer, tensors_of

Kept = tuple[Tensor | None, ...]
"""Tensors that an operation keeps for its backward pass."""


class Keep(NamedTuple):
    """Needs of an operation's backward pass. ``output``: it reads the operation's output.

    ``again``: the backward pass runs the operation again, so values that this recomputes are not kept. ``source``: the
    backward pass recomputes its source. ``owns``: no other operation reads its source, in either pass.
    """

    output: bool = False
    again: bool = False
    source: bool = False
    owns: bool = False


class PackedPositions(NamedTuple):
    """Tables of the rotation, (b or 1, t, half), each None without a rotation, and the bounds of the sequences.

    The bounds are positions in the flattened batch. So are those of ``forks``, at which sequences continue others.
    """

    cos: Float[Tensor, "#b t half"] | None
    sin: Float[Tensor, "#b t half"] | None
    cu_seqlens: Int[Tensor, " n_sequences_plus_1"]
    forks: tuple[Fork, ...] = ()


NOWHERE = PackedPositions(None, None, torch.empty(0, dtype=torch.long))


class Trained(Operation):
    """Operation with a backward pass."""

    trains_on: ClassVar[tuple[str, ...]] = ("source",)
    """Names of the fields with the registers that `train` reads, the first one's maker first."""
    needed: ClassVar[tuple[str, ...]] = ("source",)
    """Those of them whose values `back` reads."""
    cheap: ClassVar[bool] = False
    """Return True if its output is computed again in the backward pass rather than kept."""

    @property
    def untrained(self) -> str | None:
        return None

    @property
    def sources(self) -> tuple[Register, ...]:
        """Registers that `train` reads."""
        return tuple(getattr(self, name) for name in self.trains_on)

    @property
    def output(self) -> Register:
        """Register that `train` writes."""
        return self.writes[-1]

    @property
    def gives_output(self) -> bool:
        """Return True if `back` recomputes the output."""
        return False

    @abstractmethod
    def acting(self, at: Acting) -> Any:
        """Return the operation's weights in their current state, or None if the block's own code has to run."""

    def layers_of(self, weights: Any) -> tuple[LinearLayer, ...]:
        """Return the operation's linear layers, whose records receive gradients."""
        return ()

    def tensors_of(self, weights: Any) -> tuple[Tensor, ...]:
        """Return the tensors that receive gradients."""
        return tensors_of(self.layers_of(weights))

    def masked(self, weights: Any, at: Acting, x: Tensor) -> Any:
        """Return the operation's weights with dropout masks for the rows of x (b, t, width)."""
        return weights

    @abstractmethod
    def train(self, weights: Any, run: ActingStretch, frame: Frame, keep: Keep) -> Kept:
        """Compute the output and write it to the register `output`. Return the tensors that `back` reads."""

    def again(self, weights: Any, run: ActingStretch, frame: Frame, kept: Kept) -> Kept:
        """Compute the output again in the backward pass, with the help of what was kept."""
        return self.train(weights, run, frame, Keep())

    def kept_output(self, weights: Any, kept: Kept) -> list[Tensor] | None:
        """Return the operation's output if it was kept, or None."""
        return None

    @abstractmethod
    def back(self, weights: Any, tape: Tape) -> Any:
        """Remove the output's gradients from the tape, and add those of the sources.

        Return the gradients of the layers' records. If there are no layers and `gives_output` is True, return the
        output instead.
        """


@dataclass(frozen=True)
class TrainedStretch:
    """Consecutive operations (a *stretch*) that run as one autograd node.

    Their only inputs are the residual stream and one register.
    """

    operations: tuple[Trained, ...]

    @cached_property
    def source(self) -> Register:
        """The register that the first operation reads."""
        return self.operations[0].sources[0]

    @cached_property
    def target(self) -> Register:
        """The register that the last operation writes."""
        return self.operations[-1].output

    @cached_property
    def makers(self) -> tuple[dict[str, int], ...]:
        """For each operation, the index of the earlier operation that wrote each register, by the register's name."""
        written = [{op.output.name: place} for place, op in enumerate(self.operations[:-1])]
        return tuple(itertools.accumulate(written, lambda known, new: known | new, initial={}))

    @cached_property
    def done(self) -> tuple[tuple[str, ...], ...]:
        """For each operation, the registers that no later operation reads."""
        later, found = {self.target.name}, []
        for op in reversed(self.operations):
            names = [register.name for register in op.sources]
            found.append(tuple(name for name in names if name not in later))
            later.update(names)
        return tuple(reversed(found))

    @cached_property
    def keeps(self) -> tuple[tuple[Keep, ...], tuple[Keep, ...]]:
        """Return what each operation keeps for the backward pass, in two forms: if nothing expensive is recomputed, and
        if the first products are.
        """
        return self._keeps(frozenset()), self._keeps(self._first_products())

    def _keeps(self, again: frozenset[int | None]) -> tuple[Keep, ...]:
        each = tuple(zip(self.makers, self.operations, strict=True))
        needed = {made.get(getattr(op, name).name) for made, op in each for name in op.needed} - again
        return tuple(
            Keep(place in needed, place in again, made.get(op.sources[0].name) in again, self._owns(place))
            for place, (made, op) in enumerate(each)
        )

    def _owns(self, place: int) -> bool:
        name = self.operations[place].sources[0].name
        made = self.makers[place].get(name)
        return made is not None and self.operations[made].cheap and name in self.done[place]

    def _first_products(self) -> frozenset[int | None]:
        """Return the indices of the first operations that are not cheap to recompute. These read only the stretch's
        source or outputs of cheap operations.
        """
        cheap: set[int | None] = {None}
        found = set[int | None]()
        for place, (made, op) in enumerate(zip(self.makers, self.operations, strict=True)):
            if {made.get(register.name) for register in op.sources} <= cheap:
                (cheap if op.cheap else found).add(place)
        return frozenset(found)

    @cached_property
    def without_sum(self) -> TrainedStretch | None:
        """The operations before the last one, if only the last one adds to the residual stream. Otherwise None."""
        last = [op for op in self.operations if op.output.name == STREAM]
        return TrainedStretch(self.operations[:-1]) if last == [self.operations[-1]] else None

    def acting(self, at: Acting, *, again: bool) -> ActingStretch | None:
        """Return the operations with the current weights of a block, or None if the block's own code has to run.

        If ``again``, the first products are computed again in the backward pass, instead of being kept.
        """
        weights = []
        for op in self.operations:
            own = op.acting(at)
            if own is None:
                return None
            weights.append(own)
        return ActingStretch(self, tuple(weights), at, again)


@dataclass(frozen=True, slots=True)
class ActingStretch:
    """Consecutive operations with their current weights, for x of a size (b, t, width) in a pass.

    ``again``: the first products are recomputed in the backward pass, after the operations that read them have run.
    """

    stretch: TrainedStretch
    weights: tuple[Any, ...]
    at: Acting
    again: bool
    size: torch.Size = field(default_factory=torch.Size)
    positions: PackedPositions = NOWHERE

    @property
    def adds(self) -> bool:
        """Return True if the operations add to the residual stream. Otherwise they return the summand, on which
        bottlenecks act.
        """
        return self.stretch.target.name == STREAM

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values between the input and the addition to the residual stream."""
        return self.at.dtype

    @property
    def layers(self) -> tuple[tuple[LinearLayer, ...], ...]:
        """Linear layers of each operation."""
        return tuple(op.layers_of(own) for op, own in zip(self.stretch.operations, self.weights, strict=True))

    def __call__(
        self, x: Float[Tensor, "b t d"], positions: PackedPositions, stream: Tensor | None = None
    ) -> Float[Tensor, "b t d"]:
        """Run the operations and return the last register. Dropout masks are drawn in the order of the model's own
        code.

        ``stream`` is the residual stream to which they add, if it is not x.
        """
        each = zip(self.stretch.operations, self.weights, strict=True)
        weights = tuple(op.masked(own, self.at, x) for op, own in each)
        run = replace(self, weights=weights, size=x.shape, positions=positions)
        found = [op.tensors_of(own) for op, own in zip(self.stretch.operations, weights, strict=True)]
        counts = [len(tensors) for tensors in found]
        y: Tensor = _Node.apply(x, stream, run, counts, *itertools.chain(*found))  # type: ignore[no-untyped-call]
        return y

    def forward(self, frame: Frame) -> list[Kept]:
        """Run the operations on the registers in ``frame``. Return, for each operation, the tensors that it keeps for
        the backward pass.
        """
        stretch, kept = self.stretch, []
        each = zip(stretch.operations, self.weights, stretch.keeps[self.again], stretch.done, strict=True)
        for op, own, keep, done in each:
            kept.append(op.train(own, self, frame, keep))
            for name in done:
                del frame[name]
        return kept


class Tape:
    """Backward pass of consecutive operations. It holds the gradients of registers, and their values as each operation
    read them.

    ``kept`` are the tensors that the current operation has kept. ``wants`` marks the operations whose inputs need a
    gradient.
    """

    def __init__(
        self, run: ActingStretch, x: Tensor, dy: Tensor, kept: list[Kept], counts: Sequence[int], wants: Sequence[bool]
    ) -> None:
        self.run, self._kept, self._counts, self._wants = run, kept, counts, wants
        self._given = {run.stretch.source.name: [x]}
        self._steps = tuple(zip(run.stretch.operations, run.weights, strict=True))
        self._makers, self._place = run.stretch.makers, len(kept)
        self._outer, self._gradients = dy, {run.stretch.target.name: [dy]}
        self._made: dict[int, list[Tensor]] = {}
        self._records: dict[int, tuple[Tensor | None, ...]] = {}

    @property
    def kept(self) -> Kept:
        return self._kept[self._place]

    @property
    def wants(self) -> bool:
        return self._wants[self._place]

    def walk(self) -> tuple[Tensor | None, ...]:
        """Run backward all operations whose gradients are needed. Return the gradients of all records."""
        for place in reversed(range(len(self._steps))):
            if not self._wants[place + 1] and self._steps[place][0].output != self.run.stretch.target:
                break
            if place not in self._records:
                found = self._back(place)
                self._records[place] = found if self._counts[place] else ()
        none = ((None,) * n for n in self._counts)
        return tuple(t for place, own in enumerate(none) for t in self._records.get(place, own))

    def value(self, register: Register) -> list[Tensor]:
        """Return the tensors that the operation read from a register."""
        return self._value(self._place, register)

    def take(self, register: Register) -> list[Tensor]:
        """Remove the gradients of a register from the tape and return them. The caller may overwrite them if `owns` is
        True.
        """
        return self._gradients.pop(register.name)

    def take_known(self, register: Register) -> Tensor | None:
        """Return and remove the gradient that a register of one tensor has so far, if it has any."""
        known = self._gradients.pop(register.name, None)
        return None if known is None else known[0]

    def give(self, register: Register, gradients: Sequence[Tensor]) -> None:
        """Add ``gradients`` to the gradients that a register has so far."""
        known = self._gradients.pop(register.name, None)
        if known is not None:
            pairs = zip(gradients, known, strict=True)
            gradients = [new.add_(old) if self.owns(new) else new + old for new, old in pairs]
        self._gradients[register.name] = list(gradients)

    def owns(self, gradient: Tensor) -> bool:
        """Return True if a gradient may be overwritten: it may not if autograd passed it in."""
        return gradient is not self._outer

    def maker(self, register: Register) -> Trained | None:
        """Return the operation that computed a register's content, or None if the content is an input."""
        made = self._makers[self._place].get(register.name)
        return None if made is None else self._steps[made][0]

    def prepare(self, register: Register) -> None:
        """Recompute the sources of the operation that computed a register, which its backward pass reads. This is
        called before gradients take memory.
        """
        made = self._makers[self._place][register.name]
        for source in self._steps[made][0].sources:
            self._value(made, source)

    def through(self, register: Register, gradient: Tensor) -> Tensor:
        """Run the backward pass of the operation that computed a register, from the register's gradient.

        Return the register's value, which this pass computes again. The caller must be the register's only reader.
        """
        before, made = self._place, self._makers[self._place][register.name]
        self.give(register, [gradient])
        self._records[made] = ()
        output: Tensor = self._back(made)
        self._place = before
        return output

    def _back(self, place: int) -> Any:
        self._place = place
        op, own = self._steps[place]
        found = op.back(own, self)
        for register in op.sources if self._made else ():
            self._made.pop(self._makers[place].get(register.name, -1), None)
        return found

    def _value(self, place: int, register: Register) -> list[Tensor]:
        made = self._makers[place].get(register.name)
        return self._given[register.name] if made is None else self._output(made)

    def _output(self, place: int) -> list[Tensor]:
        """Return the output of the operation at index ``place``: kept in the forward pass, or recomputed. An operation
        that is not cheap is recomputed only once.
        """
        op, own = self._steps[place]
        found = self._made.get(place) or op.kept_output(own, self._kept[place])
        if found is None:
            frame: Frame = {register.name: self._value(place, register) for register in op.sources}
            kept = op.again(own, self.run, frame, self._kept[place])
            found = op.output.read(frame)
            if not op.cheap:
                self._kept[place], self._made[place] = kept, found
        return found


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, stream: Tensor | None, run: ActingStretch, counts: list[int], *tensors: Tensor | None
    ) -> Tensor:
        stretch = run.stretch
        frame: Frame = {stretch.source.name: x.reshape(-1, x.shape[-1])}
        if stream is not None:
            frame[stretch.target.name] = stream.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            kept = run.forward(frame)
        ctx.run, ctx.counts, ctx.streams, ctx.sizes = run, counts, stream is not None, [len(own) for own in kept]
        ctx.save_for_backward(x, *itertools.chain(*kept))
        # No view: FSDP2 puts hooks on a block's output, which views may lose.
        y: Tensor = torch.ops.aten._unsafe_view.default(frame[stretch.target.name], x.shape)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        run, stretch, (x, *tensors) = ctx.run, ctx.run.stretch, ctx.saved_tensors
        rest = iter(tensors)
        kept = [tuple(itertools.islice(rest, size)) for size in ctx.sizes]
        counts, asked = ctx.counts, iter(ctx.needs_input_grad[4:])
        own = [any([*itertools.islice(asked, count)]) for count in counts]
        wants = tuple(itertools.accumulate(own, lambda a, b: a or b, initial=ctx.needs_input_grad[0]))
        flat, dy = (t.reshape(-1, x.shape[-1]) for t in (x, grads[0]))
        tape = Tape(run, flat, dy, kept, counts, wants)
        del tensors, rest, kept
        with torch.autocast(x.device.type, enabled=False):
            records = tape.walk()
            dx = tape.take(stretch.source)[0].view(x.shape) if ctx.needs_input_grad[0] else None
            dstream = tape.take(stretch.target)[0].view(x.shape) if ctx.streams else None
        return dx, dstream, None, None, *records
