"""Finding the sites of a transformers model and putting adapters on them, in place."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.core.method import LinearMethod, MethodConfig, ResidualMethod, TargetedConfig
from veneer.core.targets import ALL_LINEAR, ModuleIndex, matches_any, select_targets
from veneer.errors import AdapterNameError, TargetError
from veneer.model.default_targets import defaults_for
from veneer.model.linear import AdaptedLinear, adapt_linear, is_linear, restore_linear
from veneer.model.residual import ResidualAdapters, attach_residual, detach_residual
from veneer.model.state import AdapterState


def module_index(model: PreTrainedModel) -> ModuleIndex:
    """The module paths of a model. ``"all-linear"`` leaves the output head out."""
    names = {name: module for name, module in model.named_modules() if name and ".adapters" not in name}
    linear = tuple(name for name, module in names.items() if is_linear(module))
    head = model.get_output_embeddings()
    return ModuleIndex(
        all_names=tuple(names), adaptable=linear, all_linear=tuple(n for n in linear if names[n] is not head)
    )


def targets_of(model: PreTrainedModel, config: MethodConfig) -> tuple[str, ...]:
    """The module paths that a linear method's config means in this model."""
    if not isinstance(config, TargetedConfig):
        raise TargetError(f"{type(config).__name__} does not target modules by name")
    default = config.default_targets if isinstance(config, LinearMethod) else ()
    return select_targets(config, module_index(model), default)


def resolved(model: PreTrainedModel, config: MethodConfig) -> MethodConfig:
    """The config with what it leaves to the model filled in: default targets, ``"all-linear"`` as names, the base."""
    changes: dict[str, object] = {}
    if config.base_model_name_or_path is None and model.config.name_or_path:
        changes["base_model_name_or_path"] = model.config.name_or_path
    if isinstance(config, TargetedConfig):
        if config.target_modules is None:
            changes |= defaults_for(config.peft_type, model.config.model_type)
        elif config.target_modules == ALL_LINEAR:
            changes["target_modules"] = shortest_names(module_index(model), targets_of(model, config))
    return replace(config, **changes)  # type: ignore[arg-type]


def shortest_names(index: ModuleIndex, chosen: tuple[str, ...]) -> tuple[str, ...]:
    """The last parts of the paths where they mean exactly these modules, otherwise the paths."""
    endings = tuple(sorted({path.rpartition(".")[2] for path in chosen}))
    meant = {name for name in index.adaptable if matches_any(name, endings)}
    return endings if meant == set(chosen) else chosen


def attach(
    model: PreTrainedModel,
    config: MethodConfig,
    name: str,
    state: AdapterState,
    generator: torch.Generator | None = None,
) -> None:
    """Add one adapter's parameters wherever its config means. They start in float32 beside a 16-bit base."""
    if name in state.configs:
        raise AdapterNameError(
            f"an adapter named {name!r} is there already; loaded: {sorted(state.configs)}. "
            "Choose another name or delete it first."
        )
    config = resolved(model, config)
    if isinstance(config, LinearMethod):
        _attach_linear(model, config, name, state, generator)
    elif isinstance(config, ResidualMethod):
        attach_residual(model, config, name, state, generator)
    else:
        raise TargetError(f"{type(config).__name__} is none of the kinds of method that a model can take")


def detach(model: PreTrainedModel, state: AdapterState, name: str) -> None:
    """Take one adapter off; what it was attached to is then as it was before."""
    del state.configs[name]
    state.active = tuple(n for n in state.active if n != name)
    detach_residual(model, name)
    for layer in adapted_layers(model).values():
        if name in layer.adapters:
            del layer.adapters[name]
        if not layer.adapters:
            restore_linear(layer)


def live_parameters(model: PreTrainedModel, state: AdapterState, name: str) -> dict[str, Tensor]:
    """Every trained tensor of one adapter, of any kind of method, by its key on disk: the parameters, not copies."""
    found: dict[str, Tensor] = {}
    for path, place in adapted_places(model).items():
        if name in place.adapters:
            parameters = dict(place.adapters[name].named_parameters())
            keys = place.disk_keys(name, path)
            found |= {keys[key]: value for key, value in parameters.items()}
    return found


def stored_tensors(model: PreTrainedModel, state: AdapterState, name: str) -> dict[str, Tensor]:
    """What a plain save of one adapter holds, by its key on disk: the parameters, or what a network makes of them."""
    return live_parameters(model, state, name)


def adapted_places(model: nn.Module) -> dict[str, AdaptedLinear | ResidualAdapters]:
    """Every module that holds adapters, of any kind of method, by path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (AdaptedLinear, ResidualAdapters))}


def _attach_linear(
    model: PreTrainedModel, config: LinearMethod, name: str, state: AdapterState, generator: torch.Generator | None
) -> None:
    targets = targets_of(model, config)
    state.configs[name] = config
    for path in targets:
        module = model.get_submodule(path)
        layer = module if isinstance(module, AdaptedLinear) else adapt_linear(path, module, state)
        site = layer.site()
        device = next(module.parameters()).device
        values = config.init(site, generator)
        layer.adapters[name] = nn.ParameterDict({key: nn.Parameter(value.to(device)) for key, value in values.items()})


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers by module path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}
