"""Operation for linear layers that read one input, with the changes of adapter versions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from veneer.model.blueprint.parts import Linear
from veneer.model.program.acting import Acting
from veneer.model.program.binding import Binding
from veneer.model.program.linears import Linears
from veneer.model.program.operation import Frame, Register
from veneer.model.program.rows import PassRows
from veneer.model.program.stretch import ActingStretch, Keep, Kept, Tape, Trained
from veneer.model.program.version import OwnChanges
from veneer.ops.cpu.step import LayerChange, StepProgram, layer_parts
from veneer.ops.linear import op
from veneer.ops.linear.layer import LinearLayer
from veneer.ops.packed import PackedWeight
from veneer.records.deltas import LinearDelta


@dataclass(frozen=True, slots=True, kw_only=True)
class Product(Trained):
    """Linear layers: ``target = [W x + c, …]``, the output of each layer for the same ``source``.

    For the backward pass, it keeps products with the low-rank factors A, products before trained maps of the output,
    and outputs that later operations read.
    """

    linears: tuple[Linear, ...]
    source: Register
    target: Register

    @property
    def layers(self) -> tuple[Linear, ...]:
        return self.linears

    def bind(self, to: Binding) -> Linears:
        return to.linears(self.linears)

    def forward(self, weights: Linears, rows: PassRows, frame: Frame) -> None:
        self.target.write(frame, weights(frame[self.source.name], rows.versions, rows.runs))

    def emit(self, weights: Linears, step: StepProgram) -> bool:
        return add_product(weights, step, self.source, self.target)

    def group(self, weights: Linears) -> Linears:
        return weights

    def acting(self, at: Acting) -> tuple[LinearLayer, ...] | None:
        found = [at.layer(linear.path) for linear in self.linears]
        return None if any(layer is None for layer in found) else cast("tuple[LinearLayer, ...]", tuple(found))

    def layers_of(self, weights: tuple[LinearLayer, ...]) -> tuple[LinearLayer, ...]:
        return weights

    def masked(self, weights: tuple[LinearLayer, ...], at: Acting, x: Tensor) -> tuple[LinearLayer, ...]:
        return tuple(at.masked(each.path, layer, x) for each, layer in zip(self.linears, weights, strict=True))

    def dtype_in(self, run: ActingStretch) -> torch.dtype:
        """Return the dtype of its products."""
        return run.dtype

    def train(self, weights: tuple[LinearLayer, ...], run: ActingStretch, frame: Frame, keep: Keep) -> Kept:
        ys, kept = op.forward(_in(self.dtype_in(run), self.source.read(frame)), weights, owns_x=keep.owns)
        self.target.write(frame, ys)
        kept = kept.without_products() if keep.again else kept
        pairs = zip(ys, kept.products, strict=True)
        return (*kept.tensors, *(y if keep.output and z is None else None for y, z in pairs))

    def kept_output(self, weights: tuple[LinearLayer, ...], kept: Kept) -> list[Tensor] | None:
        of_layers, ys = self._kept(weights, kept)
        if any(y is None and z is None for y, z in zip(ys, of_layers.products, strict=True)):
            return None
        return list(op.outputs(ys, of_layers, weights))

    def back(self, weights: tuple[LinearLayer, ...], tape: Tape) -> tuple[Tensor | None, ...]:
        """Add the gradient of the source to the tape, and return the gradients of the layers' records.

        The gradients of low-rank factors need the source. If the operation before recomputes the source in its own
        backward pass, that pass runs before they are computed.
        """
        dys, (kept, _), maker = tape.take(self.target), self._kept(weights, tape.kept), tape.maker(self.source)
        dtype = self.dtype_in(tape.run)
        late = (
            dtype == tape.run.dtype
            and maker is not None
            and maker.gives_output
            and len(weights) == 1
            and op.takes_input_late(weights[0])
        )
        if late and tape.wants:
            tape.prepare(self.source)
            return op.backward_before_input(dys[0], kept, weights[0], lambda dx: tape.through(self.source, dx))
        x = _in(dtype, tape.value(self.source))
        owns, overwrite = maker is not None and maker.cheap, tape.owns(dys[0])
        found = op.backward(dys, x, kept, weights, input_grad=tape.wants, overwrite=overwrite, owns_x=owns)
        if found.x is not None:
            tape.give(self.source, [found.x.to(tape.run.dtype)])
        return found.records

    def _kept(self, weights: tuple[LinearLayer, ...], kept: Kept) -> tuple[op.SavedForBackward, Kept]:
        """Split the tensors kept for the backward pass in two: those that the layers' own backward pass needs, and the
        layers' outputs.
        """
        n = len(weights)
        return op.SavedForBackward.of(kept[:-n], weights), kept[-n:]


def _in(dtype: torch.dtype, xs: list[Tensor]) -> Tensor:
    """Return the first tensor of a list in ``dtype``. If it has this dtype already, return the tensor itself, because
    even a conversion that changes nothing takes time.
    """
    return xs[0] if xs[0].dtype == dtype else xs[0].to(dtype)


def add_product(
    linears: Linears, step: StepProgram, source: Register, target: Register, beside: Register | None = None
) -> bool:
    """Add the layers of a group, which read ``source``, to the program in C++. Return False if the C++ code does not
    support them.

    If ``beside`` is given, the output of the single layer is added to ``target``, after bottlenecks have changed it.
    These read the output itself, or the register ``beside``.
    """
    group, dtypes = linears.group, {bias.dtype for bias in linears.biases if bias is not None}
    if group is None or {part.dtype for part in group.parts} | dtypes != {step.dtype}:
        return False
    wide = [None if bias is None else bias.float() for bias in linears.biases]
    each = enumerate(zip(group.parts, linears.biases, wide, strict=True), start=step.first_of(target))
    layers = [layer_parts(weight, bias, number, floats) for number, (weight, bias, floats) in each]
    joined = (0, 0) if group.whole is None else (group.whole.panels, linears.bias)
    stream = (-1, -1) if beside is None else (step.first_of(target), step.first_of(beside))
    step.add("product", layers, *joined, step.first_of(source), *stream)
    return True


def changes_of(own: OwnChanges, dtype: torch.dtype) -> tuple[LayerChange, ...] | None:
    """Return a version's changes of layers, except low-rank pairs; empty if there are none.

    Return None if the C++ code does not support one of them.
    """
    if own.only_adds:
        return ()
    found = tuple(_changes(own, dtype))
    return None if any(each is None for each in found) else cast(tuple[LayerChange, ...], found)


def _changes(own: OwnChanges, dtype: torch.dtype) -> Iterator[LayerChange | None]:
    for i, record in enumerate(own.records):
        whole = own.whole.get(i)
        if not _is_known(record) or not (whole is None or (isinstance(whole, PackedWeight) and whole.dtype == dtype)):
            yield None
            continue
        bias = None if record.bias is None else record.bias.detach().contiguous()
        if whole is not None and bias is not None and bias.dtype != dtype:
            yield None
            continue
        yield LayerChange(
            in_scale=_vector(record.input_scale),
            out_scale=_vector(record.output_scale),
            bias=_vector(bias),
            own_bias=bias if whole is not None else None,
            whole=whole,
            pair=own.apart[i] if own.apart else None,
            terms=own.terms[i] if own.terms else None,
        )


def _is_known(record: LinearDelta) -> bool:
    """Return True if a record has, besides its packed low-rank pair, only scales and a bias, in dtypes of at most 32
    bits.
    """
    return record.is_elementary and all(tensor.dtype.itemsize <= 4 for tensor in record.tensors)


def _vector(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().float().contiguous()
