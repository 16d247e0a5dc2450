"""Bottlenecks in the residual stream, added by hooks: the modules of the model keep their classes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.contract import ResidualMethod
from veneer.contract.keys import SUBLAYER
from veneer.contract.places import Placed, placed
from veneer.errors import TargetError
from veneer.model.adapted.allocation import Allocation
from veneer.model.adapted.holder import Holder
from veneer.model.adapted.masks import masks_of
from veneer.model.adapted.routing import BASE, Routing
from veneer.model.adapted.state import AdapterState
from veneer.model.modules.plan import AttachPlan
from veneer.model.modules.snapshot import Snapshot
from veneer.model.sites.structure import ResidualSublayer, sublayers
from veneer.ops.dropout import Mask, dropout
from veneer.records.deltas import ResidualDelta
from veneer.records.residual import residual_change
from veneer.records.sites import ResidualSite


class ResidualAdapters(Holder):
    """Bottlenecks after one sub-layer, by adapter name. It is a child of the block, so that it moves with the model."""

    def __init__(self, site: ResidualSite, state: AdapterState, model: nn.Module, place: ResidualSublayer) -> None:
        super().__init__()
        self.site, self.adapter_state = site, state
        self.adapters = nn.ModuleDict()
        self._input: Tensor | None = None
        self.handles = [
            model.get_submodule(place.input_path).register_forward_pre_hook(self._keep_input, with_kwargs=True),
            model.get_submodule(place.output_path).register_forward_hook(self._change_output),
        ]

    def leave(self, model: nn.Module, path: str) -> None:
        for handle in self.handles:
            handle.remove()
        block, _, child = path.rpartition(".")
        delattr(model.get_submodule(block), child)

    def record(self, name: str) -> ResidualDelta:
        """Return the bottleneck of adapter ``name`` at this sub-layer as tensors, computed from its parameters."""
        return self._method(name).lower(self.site, dict(self.adapters[name].named_parameters()))

    def _method(self, name: str) -> ResidualMethod:
        return cast(ResidualMethod, self.adapter_state.configs[name])

    @property
    def reads_input(self) -> bool:
        """Return True if an active bottleneck reads the sub-layer's input."""
        return any(self.record(name).where != "serial" for name in self.acting_on_rows())

    def _keep_input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.acting_on_rows():
            self._input = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point())

    def _change_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.acting_on_rows():
            return None
        x, self._input = self._input, None
        if not isinstance(output, tuple):
            return self.changed(output, x)
        return (self.changed(output[0], x), *output[1:])

    def changed(self, hidden: Tensor, x: Tensor | None) -> Tensor:
        """Return a sub-layer's output ``hidden`` (b, t, d) after the active bottlenecks; x is the sub-layer's input.

        Several bottlenecks act one after another, so one that reads the output reads it with the changes of those
        before.
        """
        names, routing = self.acting_on_rows(), self.adapter_state.routed()
        if routing is None:
            for name in names:
                hidden = hidden + self._change(name, hidden, x, None)
        else:
            changes = torch.zeros_like(hidden)
            for name, rows in routing.groups(hidden.shape[0], names, self.site.name, hidden.device):
                if name != BASE:
                    change = self._change(name, hidden[rows], None if x is None else x[rows], routing)
                    changes = changes.index_copy(0, rows, change)
            hidden = hidden + changes
        return hidden

    def _change(self, name: str, hidden: Tensor, x: Tensor | None, routing: Routing | None) -> Tensor:
        """Return the change that a bottleneck makes to a sub-layer's output ``hidden``, given the sub-layer's input."""
        record = self.record(name)
        change = residual_change(record, hidden if record.where == "serial" or x is None else x)
        p = self._method(name).dropout if self.training and self.adapter_state.drops else 0.0
        if p:
            own = None if routing is None else replace(routing, names=(name,) * change.shape[0])
            (mask,) = masks_of([p], change.shape, change.device, own)
            change = dropout(change, cast(Mask, mask))
        return change.to(hidden.dtype)


def residual_places(snapshot: Snapshot, plan: AttachPlan) -> dict[str, Placed]:
    """Return the sub-layers after which an adapter has bottlenecks, by path."""
    config = cast(ResidualMethod, plan.config)
    sites = map(residual_site, places_of(cast(PreTrainedModel, snapshot.model), config))
    return {site.name: placed(config, site, site.name) for site in sites}


def put_bottlenecks_on(
    snapshot: Snapshot, name: str, state: AdapterState, plan: AttachPlan, allocation: Allocation
) -> None:
    """Put the bottlenecks of adapter ``name`` after the sub-layers that its config names."""
    model, config = cast(PreTrainedModel, snapshot.model), cast(ResidualMethod, plan.config)
    with state.base_alone():
        places = places_of(model, config)
    for place in places:
        site = residual_site(place)
        device = next(model.get_submodule(place.block_path).parameters()).device
        holder = _holder(model, place, state)
        held = allocation.parameters(config, site, device, model.dtype)
        holder.hold(name, held, placed(config, site, site.name).keys)


def places_of(model: PreTrainedModel, config: ResidualMethod) -> tuple[ResidualSublayer, ...]:
    """Return the sub-layers that a config selects in this model.

    Raises TargetError if the model has none of them, or lacks one of the layers named.
    """
    found = sublayers(model)
    there = {place.layer for place in found}
    layers = there if config.layers is None else set(config.layers)
    kept = tuple(place for place in found if place.kind in config.sublayers and place.layer in layers)
    absent = [kind for kind in config.sublayers if all(place.kind != kind for place in found)]
    if absent:
        raise TargetError(
            f"{type(model).__name__} has no {', '.join(absent)} sub-layers; it has {sorted({p.kind for p in found})}"
        )
    if not kept or layers - there:
        raise TargetError(
            f"{type(config).__name__} wants layers {sorted(layers)} of {type(model).__name__}, which has {min(there)} "
            f"to {max(there)}: give layers_to_transform among them"
        )
    return kept


def residual_site(place: ResidualSublayer) -> ResidualSite:
    """Describe a sub-layer by its shapes."""
    return ResidualSite(
        name=f"{place.block_path}.{SUBLAYER}{place.kind}",
        layer=place.layer,
        sublayer=place.kind,
        features=place.features,
    )


def _holder(model: nn.Module, place: ResidualSublayer, state: AdapterState) -> ResidualAdapters:
    block, child = model.get_submodule(place.block_path), f"{SUBLAYER}{place.kind}"
    if not hasattr(block, child):
        block.add_module(child, ResidualAdapters(residual_site(place), state, model, place))
    return cast(ResidualAdapters, getattr(block, child))
