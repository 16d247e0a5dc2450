"""Binds operations to a model: to its weights, its packed weights, and the adapter versions that change them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from veneer.model.blueprint.alibi import Alibi
from veneer.model.blueprint.parts import Linear, Stack
from veneer.model.blueprint.rotary import Rotary
from veneer.model.program.expert_stacks import ExpertStacks, Stacks
from veneer.model.program.linears import Linears, Packed, Ready
from veneer.model.program.version import Versions


@dataclass(frozen=True, slots=True, eq=False)
class Binding:
    """All that operations need of a model to get their weights.

    ``packed`` and ``stacks`` are the packed weights of linear layers and of experts. ``turns`` are the cosines and
    sines of each rotation by position, and ``biases`` the biases of attention by position. ``versions`` are the adapter
    versions, which may change later. ``groups`` are the groups of linear layers and the stacks of experts bound so far,
    in order. For ``ready`` see `Linears`.
    """

    model: PreTrainedModel
    packed: Packed = field(default_factory=dict)
    versions: Versions = field(default_factory=dict)
    turns: Mapping[Rotary, tuple[Tensor, Tensor]] = field(default_factory=dict)
    biases: Mapping[Alibi, Tensor] = field(default_factory=dict)
    ready: Ready = field(default_factory=dict)
    groups: list[Linears | ExpertStacks] = field(default_factory=list)
    stacks: Mapping[tuple[str, ...], Stacks] = field(default_factory=dict)

    def linears(self, linears: tuple[Linear, ...]) -> Linears:
        """Return a group of linear layers that read the same input. A second call with the same layers returns the same
        group.
        """
        paths = tuple(linear.path for linear in linears)
        known = next((group for group in self.groups if isinstance(group, Linears) and group.paths == paths), None)
        if known is None:
            known = Linears(self.model, linears, self.packed, self.versions, len(self.groups), self.ready)
            self.groups.append(known)
        return known

    def expert_stacks(self, stacks: tuple[Stack, ...]) -> ExpertStacks:
        """Return the layers of all experts of a mixture."""
        packed = self.stacks.get(tuple(stack.path for stack in stacks))
        found = ExpertStacks(self.model, stacks, packed, self.versions, len(self.groups))
        self.groups.append(found)
        return found
