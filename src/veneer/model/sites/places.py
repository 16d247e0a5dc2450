"""Table of the kinds of place where methods act in a model, and the places of an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from veneer.contract import (
    AttentionMethod,
    LinearMethod,
    MethodConfig,
    PrefixMethod,
    PromptMethod,
    ResidualMethod,
    WholeMethod,
)
from veneer.contract.places import Placed
from veneer.errors import TargetError
from veneer.model.adapted.allocation import Allocation
from veneer.model.adapted.state import AdapterState
from veneer.model.modules.plan import AttachPlan, plan_beside, plan_layers, plan_whole
from veneer.model.modules.snapshot import Snapshot, look_at
from veneer.model.sites.attended import attended_places, put_attended_on
from veneer.model.sites.layers import layer_places, put_on_layers
from veneer.model.sites.prefix import prefix_places, put_prefix_on
from veneer.model.sites.prompt import prompt_places, put_prompt_on
from veneer.model.sites.residual import put_bottlenecks_on, residual_places


@dataclass(frozen=True)
class PlaceKind:
    """Kind of place where methods act: layers, prefixes, prompts or bottlenecks.

    ``plan`` makes the plan of an adapter on a model, from its config. ``places`` returns the places of that plan on a
    model without adapters, by path. ``put`` gives an adapter its parameters there; the modules of its plan must be
    adapted, and its config must be in the state.
    """

    places: Callable[[Snapshot, AttachPlan], dict[str, Placed]]
    put: Callable[[Snapshot, str, AdapterState, AttachPlan, Allocation], None]
    plan: Callable[[Snapshot, Any, bool], AttachPlan] = plan_beside


_KINDS: Mapping[type, PlaceKind] = {
    LinearMethod: PlaceKind(layer_places, put_on_layers, plan_layers),
    ResidualMethod: PlaceKind(residual_places, put_bottlenecks_on),
    PrefixMethod: PlaceKind(prefix_places, put_prefix_on),
    AttentionMethod: PlaceKind(attended_places, put_attended_on),
    PromptMethod: PlaceKind(prompt_places, put_prompt_on),
    WholeMethod: PlaceKind(lambda snapshot, plan: {}, lambda *given: None, plan_whole),
}


def placed_on(model: nn.Module, config: MethodConfig) -> dict[str, Placed]:
    """Return the places where a saved adapter acts in a model without adapters, by path.

    Raises TargetError if there are none. For linear layers a model on the meta device suffices.
    """
    snapshot = look_at(model)
    return places_of(snapshot, plan_of(snapshot, config, fresh=False))


def places_of(snapshot: Snapshot, plan: AttachPlan) -> dict[str, Placed]:
    """Return the places of a plan in a model without adapters, by path."""
    return _kind(plan.config).places(snapshot, plan)


def plan_of(snapshot: Snapshot, config: MethodConfig, fresh: bool) -> AttachPlan:
    """Return the plan of a config on a model. Raises TargetError with every problem.

    ``fresh``: the adapter is new, and every setting must have an effect; a saved one is accepted unchanged.
    """
    return _kind(config).plan(snapshot, config, fresh)


def put_on(snapshot: Snapshot, name: str, state: AdapterState, plan: AttachPlan, allocation: Allocation) -> None:
    """Give an adapter its parameters in the places of its plan, whose modules must be adapted already."""
    _kind(plan.config).put(snapshot, name, state, plan, allocation)


def _kind(config: MethodConfig) -> PlaceKind:
    found = next((_KINDS[base] for base in type(config).__mro__ if base in _KINDS), None)
    if found is None:
        raise TargetError(
            f"{type(config).__name__} is none of the kinds of method that a model can take: "
            f"{', '.join(kind.__name__ for kind in _KINDS)}. Derive it from one of them."
        )
    return found
