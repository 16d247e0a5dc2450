"""Norms with a model's weights, or with those by which adapter versions replace them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.model.blueprint.parts import Norm
from veneer.model.program.acting import Acting, ActingNorm
from veneer.model.program.binding import Binding
from veneer.model.program.operation import Frame, Register, StepPlace
from veneer.model.program.rows import PassRows
from veneer.model.program.stretch import ActingStretch, Keep, Kept, Tape, Trained
from veneer.model.program.version import Effects, Version, Versions
from veneer.ops.cpu.step import StepNorm, StepProgram, norm_parts
from veneer.ops.grouped_low_rank import AdapterRuns
from veneer.ops.norm import layer_norm_forward, rms_norm_forward
from veneer.ops.packed import ROWS


@dataclass(frozen=True, slots=True)
class NormWeights:
    """Norm on a model's weights; ``own`` are the base's weight and bias."""

    model: PreTrainedModel
    norm: Norm
    versions: Versions
    own: tuple[Tensor | None, Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        held = self.model.get_submodule(self.norm.path)._parameters
        weight = held["weight"] if self.norm.weight else torch.ones(self.norm.shape, device=self.model.device)
        bias = held["bias"] if self.norm.bias else None
        if self.norm.kind == "layer" and bias is None:
            bias = torch.zeros_like(cast(Tensor, weight))
        object.__setattr__(self, "own", (weight, bias))

    def __call__(self, x: Tensor, versions: tuple[str, ...], runs: AdapterRuns) -> Tensor:
        y = self.normed(x, *self.own)
        for number, start, stop in runs.runs:
            own = self.instead(self.versions[versions[number]].effects)
            if own is not None:
                y[start:stop] = self.normed(x[start:stop], *own)
        return y

    def instead(self, effects: Effects) -> tuple[Tensor | None, Tensor | None] | None:
        """Return the weight and bias by which a version replaces the base's, or None if it replaces neither."""
        keys = [(self.norm.path, name) for name in ("weight", "bias")]
        if effects.whole.keys().isdisjoint(keys):
            return None
        weight, bias = (effects.whole.get(key, own) for key, own in zip(keys, self.own, strict=True))
        return weight, bias

    def for_step(self, own: tuple[Tensor | None, Tensor | None] | None = None) -> StepNorm | None:
        """Return the norm for the program in C++, or None if the C++ code does not support it. ``own`` replaces the
        base's weight and bias.
        """
        norm, (weight, bias) = self.norm, own or self.own
        if len(norm.shape) > 1 or weight is None or weight.dtype not in ROWS:
            return None
        if norm.kind == "layer":  # as `normed` does, the offset in the weight's own dtype
            weight = weight + norm.offset if norm.offset else weight
            return StepNorm(_float(weight), _float(cast(Tensor, bias).to(weight.dtype)), norm.eps, subtracts_mean=True)
        return StepNorm(_float(weight) + norm.offset, None, norm.eps, subtracts_mean=False)

    def take(self, version: Version, place: StepPlace) -> bool:
        """Add a version's own norm to the program in C++. Return False if the C++ code does not support it."""
        own = self.instead(version.effects)
        norm = None if own is None else self.for_step(own)
        if norm is not None:
            place.step.take_norm(place.version, place.at, norm)
        return own is None or norm is not None

    def normed(self, x: Tensor, weight: Any, bias: Any) -> Tensor:
        norm = self.norm
        if len(norm.shape) > 1:  # a weight for each head
            flat = torch.ones_like(weight[0])
            y = self._flat(x, flat, torch.zeros_like(flat)) * (weight + norm.offset)
            return cast(Tensor, (y if bias is None else y + bias).to(x.dtype))
        return self._flat(x, weight, bias)

    def _flat(self, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        norm = self.norm
        if norm.kind == "layer":
            return layer_norm_forward(x, weight + norm.offset if norm.offset else weight, bias, norm.eps)[0]
        y, _ = rms_norm_forward(x, weight, norm.eps, norm.offset if len(norm.shape) == 1 else 0.0)
        return y


def _float(x: Tensor) -> Tensor:
    return x.detach().float().contiguous()


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalize(Trained):
    """Norm: ``target = norm(source)``. Its statistics are kept for the backward pass."""

    cheap = True

    norm: Norm
    source: Register
    target: Register

    @property
    def norms(self) -> tuple[Norm, ...]:
        return (self.norm,)

    def bind(self, to: Binding) -> NormWeights:
        return NormWeights(to.model, self.norm, to.versions)

    def forward(self, weights: NormWeights, rows: PassRows, frame: Frame) -> None:
        frame[self.target.name] = weights(frame[self.source.name], rows.versions, rows.runs)

    def emit(self, weights: NormWeights, step: StepProgram) -> bool:
        norm = weights.for_step()
        if norm is not None:
            step.add("norm", norm_parts(norm), step.first_of(self.source), step.first_of(self.target))
        return norm is not None

    def take(self, weights: NormWeights, version: Version, place: StepPlace) -> bool:
        return weights.take(version, place)

    def acting(self, at: Acting) -> ActingNorm | None:
        return at.norm(self.norm)

    def train(self, weights: ActingNorm, run: ActingStretch, frame: Frame, keep: Keep) -> Kept:
        [x] = self.source.read(frame)
        y, statistics = weights.forward(x)
        self.target.write(frame, [y.to(run.dtype)])
        return (statistics,)

    def back(self, weights: ActingNorm, tape: Tape) -> None:
        [dy], [x], [statistics] = tape.take(self.target), tape.value(self.source), tape.kept
        known = tape.take_known(self.source)
        tape.give(self.source, [weights.backward(dy, x, cast(Tensor, statistics), known)])
