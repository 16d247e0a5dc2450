"""Operation for experts of a mixture: it sums the weighted outputs of the best-scored experts, and a shared one's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.model.adapted.experts import CodedExperts
from veneer.model.adapted.parameters import AdaptedParameters, acting_record
from veneer.model.blueprint.parts import Experts, Stack
from veneer.model.inplace import InPlace, base_of, mixin_of
from veneer.model.program.acting import Acting, is_plain
from veneer.model.program.binding import Binding
from veneer.model.program.expert_stacks import ExpertStacks
from veneer.model.program.operation import Frame, Register
from veneer.model.program.rows import PassRows
from veneer.model.program.stretch import ActingStretch, Keep, Kept, Tape, Trained
from veneer.model.quantized.stack import place_of, stack_of
from veneer.ops.cpu.step import StepProgram
from veneer.ops.experts import MOST_EXPERTS, Router, mix, route
from veneer.ops.glu import UNITS
from veneer.ops.linear.experts import ChosenExperts, ExpertLayers, KeptOfExperts, TrainedExperts, route_backward
from veneer.ops.linear.layer import Weight
from veneer.quant.dense import DenseWeight
from veneer.records.deltas import LinearDelta
from veneer.records.frozen import FrozenWeight
from veneer.records.terms.pair import Pair


@dataclass(frozen=True, slots=True, eq=False)
class MixWeights:
    """Layers of the experts (``stacks``), and the ``bias`` that is added to the values by which they are chosen."""

    stacks: ExpertStacks
    bias: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class ActingExperts:
    """Experts in training, and the ``bias`` that is added to the values by which they are chosen."""

    experts: TrainedExperts
    bias: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MixExperts(Trained):
    """Experts: ``target = Σ weight · down(act(gate x) · up x)`` over the experts that a router chooses by ``scores``.

    ``shared`` is added, times the sigmoid of ``shared_gate`` if there is one. For the backward pass, the outputs of the
    first layers, the choices and their weights are kept.
    """

    experts: Experts
    scores: Register
    source: Register
    shared: Register | None
    shared_gate: Register | None
    target: Register

    @property
    def reads(self) -> tuple[Register, ...]:
        return tuple(each for each in (self.scores, self.source, self.shared, self.shared_gate) if each is not None)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return self.experts.gate_up, self.experts.down

    @property
    def sources(self) -> tuple[Register, ...]:
        return self.source, self.scores, *self.reads[2:]

    @property
    def needed(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("source", "scores", "shared", "shared_gate") if self.shared_gate else ("source", "scores")

    @property
    def router(self) -> Router:
        """The function that chooses experts from their scores."""
        part = self.experts
        return Router(
            n_experts=part.n_experts,
            top_k=part.top_k,
            values=part.values,
            normalized=part.normalized,
            n_groups=part.n_groups,
            kept_groups=part.kept_groups,
            scale=part.scale,
        )

    def bind(self, to: Binding) -> MixWeights:
        return MixWeights(to.expert_stacks(self.stacks), _bias(to.model.get_submodule, self.experts))

    def forward(self, weights: MixWeights, rows: PassRows, frame: Frame) -> None:
        x, ids, factors = frame[self.source.name], *route(frame[self.scores.name], self.router, weights.bias)
        shared, gate = (None if each is None else frame[each.name] for each in (self.shared, self.shared_gate))
        stacks, of_rows = weights.stacks, (rows.versions, rows.runs)
        if stacks.weights is not None:
            segments = stacks.expert_segments(*of_rows)
            act = self.experts.activation
            y = mix(x, ids, factors, stacks.weights, act, shared=shared, shared_gate=gate, segments=segments)
        else:
            y = _with_shared(stacks.by_module(x, ids, factors, *of_rows), shared, gate)
        frame[self.target.name] = y

    def emit(self, weights: MixWeights, step: StepProgram) -> bool:
        narrow = self.experts.wide_scores and step.dtype != torch.float32  # its registers have one dtype
        stacks = weights.stacks.weights
        if stacks is None or narrow:
            return False
        at = [-1 if each is None else step.first_of(each) for each in (self.shared, self.shared_gate)]
        at = [step.first_of(self.scores), step.first_of(self.source), *at, step.first_of(self.target)]
        step.add_experts(self.router, weights.bias, stacks, self.experts.activation, at)
        return True

    def group(self, weights: MixWeights) -> ExpertStacks:
        return weights.stacks

    def acting(self, at: Acting) -> ActingExperts | None:
        """Return the experts' weights with the low-rank pairs of the adapters that act on them.

        Return None if the model's own code must run the experts. That is so if they are hooked or trained, have another
        dtype or other changes than pairs, or add noise to their input. It is also so if the rows of a batch name their
        adapters.
        """
        half, path = at.module(self.experts.path), self.experts.gate_up.path.rpartition(".")[0]
        module = at.module(path)
        if not (is_plain(half) and is_plain(module)) or getattr(half, "jitter_noise", False) or not _is_frozen(module):
            return None
        if place_of(module, "down_proj")[1] != at.dtype:
            return None
        names = [name for name, _ in self._named()]
        records = [acting_record(module, name) for name in names]
        if not all(record is None or record.is_low_rank for record in records):
            return None
        stacks = [stack_of(module, name) for name in names]
        weights = ([_weight(stack.expert(n)) for n in range(self.experts.n_experts)] for stack in stacks)
        biases = (module._parameters[f"{name}_bias"] if stack.bias else None for name, stack in self._named())
        each = zip(weights, records, biases, strict=True)
        inner, down = (ExpertLayers(own, _pair(record), _as(at.dtype, bias)) for own, record, bias in each)
        experts = TrainedExperts(inner, down, self.experts.activation)
        return ActingExperts(experts, _bias(at.module, self.experts))

    def _named(self) -> Iterator[tuple[str, Stack]]:
        """Yield the stacks by the names of their parameters."""
        return ((stack.path.rpartition(".")[2], stack) for stack in self.stacks)

    def tensors_of(self, weights: ActingExperts) -> tuple[Tensor, ...]:
        return weights.experts.tensors

    def train(self, weights: ActingExperts, run: ActingStretch, frame: Frame, keep: Keep) -> Kept:
        [x], [scores], *beside = (each.read(frame) for each in self.sources)
        x = x.to(run.dtype)
        ids, factors = route(scores, self.router, weights.bias)
        y, kept = weights.experts.forward(x, ChosenExperts.of(ids, self.experts.n_experts, x), factors)
        if beside:
            [shared], *gate = beside
            y = y.add_(shared if not gate else gate[0][0].sigmoid() * shared)
        self.target.write(frame, [y])
        return (kept.hidden, *kept.us, ids, factors, *((y,) if keep.output else ()))

    def kept_output(self, weights: ActingExperts, kept: Kept) -> list[Tensor] | None:
        return [cast(Tensor, y) for y in kept[5:]] or None

    def back(self, weights: ActingExperts, tape: Tape) -> tuple[Tensor | None, ...]:
        """Add the gradients of the registers that the operation reads to the tape. Return the gradients of the low-rank
        pairs' tensors.
        """
        [dy], [x], [scores] = tape.take(self.target), tape.value(self.source), tape.value(self.scores)
        hidden, first, second, ids, factors = tape.kept[:5]
        ids, factors = cast(Tensor, ids), cast(Tensor, factors)
        kept, chosen = (
            KeptOfExperts(cast(Tensor, hidden), (first, second)),
            ChosenExperts.of(ids, self.experts.n_experts, dy),
        )
        found = weights.experts.backward(dy, x.to(dy.dtype), kept, chosen, factors)
        if self.shared is not None and self.shared_gate is None:
            tape.give(self.shared, [dy])
        elif self.shared is not None and self.shared_gate is not None:
            [shared], [gate] = tape.value(self.shared), tape.value(self.shared_gate)
            factor = gate.float().sigmoid()
            tape.give(self.shared, [(factor * dy).to(dy.dtype)])
            slope = (dy.float() * shared.float()).sum(1, keepdim=True) * factor * (1 - factor)
            tape.give(self.shared_gate, [slope.to(dy.dtype)])
        tape.give(self.scores, [route_backward(found.weights, scores, ids, self.router)])
        tape.give(self.source, [found.x])
        return found.pairs


def is_known(part: Experts) -> bool:
    """Return True if `MixExperts` can compute the experts of a description."""
    return part.activation in UNITS and part.n_experts <= MOST_EXPERTS


def _bias(module: Callable[[str], nn.Module], part: Experts) -> Tensor | None:
    """Return, in float32, the bias that is added to the values by which experts are chosen, or None if there is none.
    ``module`` returns the module at a path.
    """
    owner, _, name = part.correction.rpartition(".")
    return cast(Tensor, module(owner)._buffers[name]).float() if name else None


def _is_frozen(module: nn.Module) -> bool:
    """Return True if experts train no matrix or copy of their own, and no other library has changed their class. Return
    False if the rows of a batch name their adapters.
    """
    if isinstance(module, AdaptedParameters) and (module.copies or module.adapter_state.routed() is not None):
        return False
    cls, mixins = type(module), set[type]()
    while issubclass(cls, InPlace):
        mixins.add(mixin_of(cls))
        cls = base_of(cls)
    own = (each for each in module._parameters.values() if each is not None)
    return mixins <= {CodedExperts, AdaptedParameters} and not any(each.requires_grad for each in own)


def _as(dtype: torch.dtype, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def _pair(record: LinearDelta | None) -> Pair | None:
    """Return the low-rank pair of a record, whose factors are A and B alone."""
    return None if record is None else cast(Pair, record.low_rank).plain


def _weight(weight: FrozenWeight) -> Weight:
    return weight.tensor if isinstance(weight, DenseWeight) else weight


def _with_shared(y: Tensor, shared: Tensor | None, gate: Tensor | None) -> Any:
    if shared is None:
        return y
    return y + (shared if gate is None else gate.sigmoid() * shared)
