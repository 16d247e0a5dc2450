"""The places of an adapter on a model: of each the site, with its weight where that is loaded, and the keys."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.contract import LinearMethod, MethodConfig, PrefixMethod, PromptMethod, ResidualMethod
from veneer.contract.keys import OUT_PROJECTION, attention_path
from veneer.contract.places import (
    INPUT,
    REPEATS,
    Placed,
    placed_linear,
    placed_prefix,
    placed_prompt,
    placed_residual,
)
from veneer.model.kinds import loaded_site
from veneer.model.parameters import site_of
from veneer.model.plan import Plan, plan_of
from veneer.model.prefix import attention_sites
from veneer.model.prompt import input_site
from veneer.model.residual import places_of, residual_site
from veneer.model.snapshot import Snapshot, look_at


def placed_on(model: nn.Module, config: MethodConfig) -> dict[str, Placed]:
    """The places of a saved adapter on a model that has none, by path. Raises TargetError where it has no such places.

    Linear layers need no storage: a model on the meta device tells their shapes.
    """
    whole = cast(PreTrainedModel, model)
    if isinstance(config, ResidualMethod):
        sites = (residual_site(place) for place in places_of(whole, config))
        return {site.name: placed_residual(config, site) for site in sites}
    if isinstance(config, PrefixMethod):
        return {INPUT: placed_prefix(config, attention_sites(whole))}
    if isinstance(config, PromptMethod):
        return {INPUT: placed_prompt(config, input_site(whole))}
    snapshot = look_at(model)
    return _linear_places(snapshot, plan_of(snapshot, config, fresh=False))


def _linear_places(snapshot: Snapshot, plan: Plan) -> dict[str, Placed]:
    config, found = cast(LinearMethod, plan.config), dict[str, Placed]()
    for path in (*plan.layers, *plan.followers):
        site, on_disk = loaded_site(snapshot.kinds[path], path, snapshot.modules[path]), path
        if path in plan.outward:
            site = replace(site, name=path.removesuffix(f".{OUT_PROJECTION}"), repeats=REPEATS)
            on_disk = attention_path(path)
        found[path] = placed_linear(config, site, on_disk)
    for path, parameters in plan.parameters.items():
        module = snapshot.modules[path]
        for index, parameter in enumerate(parameters):
            name, depth = f"{path}.{parameter}", len(parameters) - 1 - index
            site = site_of(name, module, cast(Tensor, module._parameters[parameter]))
            found[name] = placed_linear(config, site, path, depth)
    return found
