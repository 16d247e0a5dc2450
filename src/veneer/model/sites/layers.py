"""Adapters in linear layers: describes the layers for a saved adapter, and gives them parameters on a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from torch import nn

from veneer.contract import MethodConfig, Params
from veneer.contract.keys import OUT_PROJECTION, attention_path
from veneer.contract.places import REPEATS, Placed, placed
from veneer.model.adapted.allocation import Allocation
from veneer.model.adapted.kinds import loaded_site
from veneer.model.adapted.linear import AdaptedSite
from veneer.model.adapted.parameters import AdaptedParameters, site_of
from veneer.model.adapted.state import AdapterState
from veneer.model.adapted.tying import follow
from veneer.model.modules.plan import AttachPlan
from veneer.model.modules.snapshot import Snapshot


def layer_places(snapshot: Snapshot, plan: AttachPlan) -> dict[str, Placed]:
    """Return the layers and parameters that an adapter changes, by path. Only shapes are read, so the model needs no
    storage.
    """
    found: dict[str, Placed] = {}
    for path in (*plan.layers, *plan.followers):
        site, on_disk = loaded_site(snapshot.kinds[path], path, snapshot.modules[path]), path
        if path in plan.outward:
            site = replace(site, name=path.removesuffix(f".{OUT_PROJECTION}"), repeats=REPEATS)
            on_disk = attention_path(path)
        found[path] = placed(plan.config, site, on_disk)
    for path, parameters in plan.parameters.items():
        module = snapshot.modules[path]
        for index, parameter in enumerate(parameters):
            name, depth = f"{path}.{parameter}", len(parameters) - 1 - index
            site = site_of(name, module, parameter)
            found[name] = placed(plan.config, site, path, depth)
    return found


def put_on_layers(snapshot: Snapshot, name: str, state: AdapterState, plan: AttachPlan, allocation: Allocation) -> None:
    """Give an adapter its parameters in the layers of its plan, which must be adapted already."""
    keys = {path: place.keys for path, place in layer_places(snapshot, plan).items()}
    layers = {path: cast(AdaptedSite, snapshot.modules[path]) for path in plan.layers}
    starts: Mapping[str, Params] = {}
    if allocation.values and plan.config.reads_weight:
        starts = plan.config.init_together({path: layer.site((name,)) for path, layer in layers.items()})
    for path, layer in layers.items():
        layer.add_adapter(name, allocation, keys[path], starts.get(path))
    _share(layers, name, keys, plan.config)
    for layer in layers.values() if allocation.values else ():
        layer.derive(name)
    for path in plan.followers:
        follow(snapshot.modules, name, plan.embeddings, path, keys[path])
    for path, parameters in plan.parameters.items():
        module = cast(AdaptedParameters, snapshot.modules[path])
        module.add_adapter(name, allocation, {parameter: keys[f"{path}.{parameter}"] for parameter in parameters})


def _share(
    layers: Mapping[str, AdaptedSite], name: str, keys: Mapping[str, Mapping[str, str]], config: MethodConfig
) -> None:
    """Let layers share the adapter's parameters that its method shares. All layers of one group, or with the same key
    on disk, use the tensor of the first of these layers.
    """
    shared = config.shared
    if shared is None or not shared.is_held:
        return
    first: dict[tuple[str, str], nn.Module] = {}
    for path, layer in layers.items():
        held = layer.adapters[name]
        for own in shared.names:
            group = keys[path][own] if shared.group is None else shared.group(path, own)
            other = first.setdefault((own, group), held)
            of = "_parameters" if own in held._parameters else "_buffers"
            getattr(held, of)[own] = getattr(other, of)[own]
