"""Operation that calls a module of the model itself (experts), for which there is no operation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from veneer.model.adapted.state import base_alone
from veneer.model.program.binding import Binding
from veneer.model.program.operation import Frame, Operation, Register
from veneer.model.program.rows import PassRows


@dataclass(frozen=True, slots=True)
class OwnModuleWeights:
    model: Any
    module: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnModule(Operation):
    """Call of a module of the model: ``target = module(source)``. Adapters that are attached to the model do not act in
    it.
    """

    path: str
    source: Register
    target: Register

    @property
    def untrained(self) -> str:
        return "its feed-forward half is of a kind that the kernels do not know"

    def bind(self, to: Binding) -> OwnModuleWeights:
        return OwnModuleWeights(to.model, to.model.get_submodule(self.path))

    def forward(self, weights: OwnModuleWeights, rows: PassRows, frame: Frame) -> None:
        with base_alone(weights.model):  # it may get adapters later
            y = weights.module(frame[self.source.name][None])
        frame[self.target.name] = (y[0] if isinstance(y, tuple) else y)[0]
