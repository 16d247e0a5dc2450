"""Experts of a mixture: the best by their scores, their weighted outputs added up, and a shared one beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from veneer.model.adapted.state import base_alone
from veneer.model.blueprint.parts import Experts, Stack
from veneer.model.program.binding import Binding, Stacks
from veneer.model.program.operation import Frame, Operation, Register
from veneer.model.program.rows import PassRows
from veneer.ops.cpu.step import StepProgram
from veneer.ops.experts import MOST_EXPERTS, Router, mix, route
from veneer.ops.glu import ACTIVATIONS


@dataclass(frozen=True, slots=True, eq=False)
class MixWeights:
    """Packed ``stacks`` of the experts; without them the model's own ``module`` computes their outputs."""

    model: nn.Module
    module: nn.Module
    stacks: Stacks | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MixExperts(Operation):
    """Experts: ``target = Σ weight · down(act(gate x) · up x)`` over those that ``scores`` choose, in their order.

    ``shared`` is added, times the sigmoid of ``shared_gate`` if there is one.
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
    def untrained(self) -> str:
        return "its feed-forward half is of a kind that the kernels do not know"

    @property
    def router(self) -> Router:
        """Choice of experts."""
        part = self.experts
        return Router(n_experts=part.n_experts, top_k=part.top_k, normalized=part.normalized)

    def bind(self, to: Binding) -> MixWeights:
        path = self.experts.gate_up.path.rpartition(".")[0]
        paths = tuple(stack.path for stack in self.stacks)
        return MixWeights(to.model, to.model.get_submodule(path), to.stacks.get(paths))

    def forward(self, weights: MixWeights, rows: PassRows, frame: Frame) -> None:
        x, ids, factors = frame[self.source.name], *route(frame[self.scores.name], self.router)
        shared, gate = (None if each is None else frame[each.name] for each in (self.shared, self.shared_gate))
        if weights.stacks is not None:
            y = mix(x, ids, factors, weights.stacks, self.experts.activation, shared=shared, shared_gate=gate)
        else:
            with base_alone(weights.model):  # it may get adapters later
                y = _with_shared(weights.module(x, ids, factors), shared, gate)
        frame[self.target.name] = y

    def emit(self, weights: MixWeights, step: StepProgram) -> bool:
        if weights.stacks is None:
            return False
        at = [-1 if each is None else step.first_of(each) for each in (self.shared, self.shared_gate)]
        at = [step.first_of(self.scores), step.first_of(self.source), *at, step.first_of(self.target)]
        step.add_experts(self.router, weights.stacks, self.experts.activation, at)
        return True


def is_known(part: Experts) -> bool:
    """Return True if `MixExperts` has an operation for the experts of a description."""
    return part.activation in ACTIVATIONS and part.n_experts <= MOST_EXPERTS


def _with_shared(y: Tensor, shared: Tensor | None, gate: Tensor | None) -> Any:
    if shared is None:
        return y
    return y + (shared if gate is None else gate.sigmoid() * shared)
