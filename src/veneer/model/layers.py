"""Linear layers as places of an adapter: described for a saved adapter, and given parameters on a model."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from torch import Tensor

from veneer.contract.keys import OUT_PROJECTION, attention_path
from veneer.contract.places import REPEATS, Placed, placed
from veneer.model.allocation import Allocation
from veneer.model.kinds import loaded_site
from veneer.model.linear import AdaptedSite
from veneer.model.parameters import AdaptedParameters, site_of
from veneer.model.plan import Plan
from veneer.model.snapshot import Snapshot
from veneer.model.state import AdapterState
from veneer.model.tying import follow


def layer_places(snapshot: Snapshot, plan: Plan) -> dict[str, Placed]:
    """Return the layers and parameters that an adapter changes, by path. Shapes suffice, no storage is needed."""
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
            site = site_of(name, module, cast(Tensor, module._parameters[parameter]))
            found[name] = placed(plan.config, site, path, depth)
    return found


def put_on_layers(snapshot: Snapshot, name: str, state: AdapterState, plan: Plan, allocation: Allocation) -> None:
    """Give an adapter its parameters at the layers of its plan, which are adapted already."""
    keys = {path: place.keys for path, place in layer_places(snapshot, plan).items()}
    for path in plan.layers:
        cast(AdaptedSite, snapshot.modules[path]).add_adapter(name, allocation, keys[path])
    for path in plan.followers:
        follow(snapshot.modules, name, plan.embeddings, path, keys[path])
    for path, parameters in plan.parameters.items():
        module = cast(AdaptedParameters, snapshot.modules[path])
        module.add_adapter(name, allocation, {parameter: keys[f"{path}.{parameter}"] for parameter in parameters})
