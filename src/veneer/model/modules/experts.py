"""Stacks of experts' weights in a model, (experts, o, i), outside of linear layers, and the cost of adapting them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from veneer.contract import LinearMethod, MethodConfig
from veneer.errors import TargetError
from veneer.model.adapted.convolution import is_convolution
from veneer.model.adapted.embedding import is_embedding
from veneer.model.adapted.parameters import site_of
from veneer.model.modules.snapshot import Snapshot
from veneer.model.quantized.stack import map_shape, parameter_names
from veneer.plain.module_names import matches_any
from veneer.plain.units import size

ALL_EXPERTS = "all-experts"


def stacks_in(modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """Return the stacks of experts by their full names, each with the path of its module and its own name there."""
    return {
        f"{path}.{name}": (path, name)
        for path, module in modules.items()
        if ("expert" in path or hasattr(module, "num_experts")) and not (is_convolution(module) or is_embedding(module))
        for name in parameter_names(module)
        if (name in module._modules or module._parameters[name] is not None) and len(map_shape(module, name)) == 3
    }


def with_experts(snapshot: Snapshot, config: LinearMethod) -> LinearMethod:
    """Return the config with ``"all-experts"`` replaced by the ends of the stacks' names.

    Raises TargetError for a model without stacks.
    """
    given = config.extras.parameters
    if ALL_EXPERTS not in given:
        return config
    stacks = stacks_in(snapshot.modules)
    if not stacks:
        raise TargetError(
            f"target_parameters names {ALL_EXPERTS!r}, and the model has no stacks of experts: leave it out (or "
            "adapter.experts)"
        )
    ends = tuple(dict.fromkeys(".".join(name.split(".")[-2:]) for name in stacks))
    known = {f"{path}.{key}" for path, module in snapshot.modules.items() for key in parameter_names(module)}
    exact = {name for name in known if matches_any(name, ends)} == set(stacks)
    others = tuple(name for name in given if name != ALL_EXPERTS)
    named: dict[str, Any] = {"target_parameters": (*others, *(ends if exact else stacks))}
    return replace(config, **named)


def told_experts(snapshot: Snapshot, config: MethodConfig) -> str | None:
    """Return a hint about stacks of experts that a config leaves out, with the cost of adapting one layer.

    Return None if the config leaves none out.
    """
    stacks = stacks_in(snapshot.modules)
    taken = config.extras.parameters
    left = {name: place for name, place in stacks.items() if not any(matches_any(name, (end,)) for end in taken)}
    if not left:
        return None
    first = next(iter(left.values()))[0]
    ours = [(path, name) for path, name in left.values() if path == first]
    sites = [site_of(f"{path}.{name}", snapshot.modules[path], name) for path, name in ours]
    n_weights = sum(site.experts * site.out_features * site.in_features for site in sites)
    n_new = config.largest_rank * sum(site.experts * (site.out_features + site.in_features) for site in sites)
    return (
        f"the experts are not adapted: {', '.join(name for _, name in ours)} of a layer ({n_weights:,} weights) are no "
        f"linear layers. LoRA's target_parameters=[{ALL_EXPERTS!r}] (adapter.experts: true) adapts them"
        + (f": {n_new:,} parameters more a layer, {size(4 * n_new)} in float32" if n_new else "")
    )
