"""Finding the sites of a transformers model and putting adapters on them, in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.contract import LinearMethod, MethodConfig, PrefixMethod, PromptMethod, ResidualMethod
from veneer.contract.keys import copy_key, shared_key
from veneer.contract.targets import ModuleIndex
from veneer.errors import AdapterNameError, TargetError
from veneer.model.adapted import Adapted, TiedFactors, restore, tensors_of
from veneer.model.allocation import Allocation
from veneer.model.copies import add_copies
from veneer.model.embedding import AdaptedEmbedding
from veneer.model.kinds import adapt_module
from veneer.model.linear import AdaptedSite
from veneer.model.parameters import add_parameters
from veneer.model.plan import Plan, plan_of
from veneer.model.prefix import PrefixAdapters, attach_prefix
from veneer.model.prompt import PromptAdapters, attach_prompt
from veneer.model.residual import ResidualAdapters, attach_residual, detach_residual
from veneer.model.snapshot import look_at
from veneer.model.state import AdapterState
from veneer.model.token_rows import add_rows
from veneer.model.tying import follow
from veneer.model.virtual_tokens import VirtualTokens, detach_virtual_tokens, virtual_tokens

Place = Adapted | ResidualAdapters | PrefixAdapters | PromptAdapters


def module_index(model: nn.Module, method: LinearMethod | None = None) -> ModuleIndex:
    """The module paths of a model, and which of them a method (None: any) can adapt: linear layers, and what else it
    knows. ``"all-linear"`` takes linear layers alone, without the output head."""
    return look_at(model).index(method)


def attach(
    model: nn.Module, config: MethodConfig, name: str, state: AdapterState, allocation: Allocation | None = None
) -> None:
    """Add one adapter's parameters wherever its config means, all or nothing.

    They are drawn from torch's global generator. Raises AdapterNameError and TargetError.
    """
    check_name(name, state)
    allocation = allocation or Allocation()
    snapshot = look_at(model)
    plan = plan_of(snapshot, config, fresh=allocation.values)
    state.configs[name] = plan.config
    try:
        _put_on(model, name, state, plan, allocation)
    except BaseException:
        detach(model, state, name)
        raise


def _put_on(model: nn.Module, name: str, state: AdapterState, plan: Plan, allocation: Allocation) -> None:
    for path in plan.modules:
        adapt_path(model, path, state)
    add_copies(model, name, plan.copied, allocation.widen)
    add_rows(model, name, plan.rows, values=allocation.values, widen=allocation.widen)
    for path in plan.layers:
        _add_parameters(cast(AdaptedSite, model.get_submodule(path)), name, allocation)
    if plan.followers:
        follow(model, name, plan.embeddings, plan.followers)
    add_parameters(model, name, plan.parameters, allocation)
    _put_beside(cast(PreTrainedModel, model), name, state, allocation)


def _put_beside(model: PreTrainedModel, name: str, state: AdapterState, allocation: Allocation) -> None:
    """The places that are no linear maps: bottlenecks in the residual stream, virtual tokens in front."""
    config = state.configs[name]
    if isinstance(config, ResidualMethod):
        attach_residual(model, name, state, allocation)
    elif isinstance(config, PrefixMethod):
        attach_prefix(model, name, state, allocation)
    elif isinstance(config, PromptMethod):
        attach_prompt(model, name, state, allocation)
    elif not isinstance(config, LinearMethod):
        raise TargetError(f"{type(config).__name__} is none of the kinds of method that a model can take")


def adapt_path(model: nn.Module, path: str, state: AdapterState) -> Adapted:
    """The module at a path, made adapted in the way of its kind."""
    return adapt_module(path, model.get_submodule(path), state)


def check_name(name: str, state: AdapterState) -> None:
    """Raise AdapterNameError where a name is taken, or cannot name a module and a folder."""
    if name in state.configs:
        raise AdapterNameError(
            f"an adapter named {name!r} is there already; loaded: {sorted(state.configs)}. "
            "Choose another name or delete it first."
        )
    allowed = isinstance(name, str) and name and all(c.isalnum() or c in "_- " for c in name)
    if not allowed or hasattr(nn.ModuleDict, name):
        raise AdapterNameError(
            f"adapter name {name!r} is not allowed: use letters, digits, '_' and '-' (it names modules and a folder), "
            "and none of the names that torch's ModuleDict uses itself"
        )


def detach(model: nn.Module, state: AdapterState, name: str) -> None:
    """Take one adapter off; what it was attached to is then as it was before."""
    del state.configs[name]
    state.schedules.pop(name, None)
    state.trainable.discard(name)
    state.active = tuple(n for n in state.active if n != name)
    detach_residual(cast(PreTrainedModel, model), name)
    detach_virtual_tokens(model, name)
    for layer in adapted_modules(model).values():
        for held in (layer.adapters, layer.copies):
            if name in held:
                del held[name]
        if not layer.adapters and not layer.copies:
            restore(layer)


def live_parameters(model: nn.Module, state: AdapterState, name: str) -> dict[str, Tensor]:
    """Every tensor of one adapter, of any kind of method, by its key on disk: the parameters themselves, not copies."""
    return {key: tensor for key, (_, tensor) in named_live_parameters(model, name).items()}


def named_live_parameters(model: nn.Module, name: str) -> dict[str, tuple[str, Tensor]]:
    """As `live_parameters`, each with its name in the model's own ``state_dict``."""
    found: dict[str, tuple[str, Tensor]] = {}
    for path, place in adapted_places(model).items():
        if name in place.adapters:
            keys = place.disk_keys(name, path)
            held = tensors_of(place.adapters[name])
            found |= {keys[key]: (f"{path}.adapters.{name}.{key}", value) for key, value in held.items()}
        if isinstance(place, Adapted) and name in place.copies:
            virtual = place.adapter_state.configs[name].is_prompt_learning
            own, adapted = place.disk_path(name, path), name in place.adapters
            found |= {
                copy_key(own, key, adapted=adapted, virtual=virtual): (f"{path}.copies.{name}.{key}", value)
                for key, value in tensors_of(place.copies[name]).items()
            }
    return found


def stored_tensors(
    model: nn.Module, state: AdapterState, name: str, values: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of a plain save of one adapter, by their keys on disk: its parameters, packed where the method packs.

    ``values`` stand in for `live_parameters`.
    """
    config = state.configs[name]
    found = packed_tensors(model, state, name, values)
    return found | shared_tensors(config) if config.shared is not None and config.shared.is_saved else found


def packed_tensors(
    model: nn.Module, state: AdapterState, name: str, values: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """`stored_tensors` without those that all layers share, which are drawn."""
    found = live_parameters(model, state, name) if values is None else dict(values)
    places: list[tuple[str, AdaptedSite | VirtualTokens]] = [
        *_with_own(model, name).items(),
        *virtual_tokens(model).items(),
    ]
    for path, layer in places:
        if name in layer.adapters:
            packed = layer.packed(name, path, found)
            for key in layer.disk_keys(name, path).values():
                del found[key]
            found |= packed
    return found | repeated_tensors(model, name, found)


def shared_tensors(config: MethodConfig) -> dict[str, Tensor]:
    """The tensors that the layers of an adapter share, by their keys on disk; empty for none."""
    return {} if config.shared is None else {shared_key(key): value for key, value in config.shared.draw().items()}


def unpacked_tensors(model: nn.Module, name: str, written: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `stored_tensors`: a value for each of `live_parameters`."""
    found = dict(written)
    for path, layer in _with_own(model, name).items():
        found |= layer.unpacked(name, path, written)
    return found


def repeated_tensors(model: nn.Module, name: str, written: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that PEFT writes once more for modules that share an adapter with the embeddings."""
    found: dict[str, Tensor] = {}
    for path, layer in adapted_layers(model).items():
        held = dict(layer.adapters.items()).get(name)
        if isinstance(held, TiedFactors):
            source = cast(AdaptedSite, model.get_submodule(held.source))
            keys, theirs = layer.disk_keys(name, path), source.disk_keys(name, held.source)
            if all(key in written for key in theirs.values()):
                seen = held.seen({own: written[key] for own, key in theirs.items()})
                found |= {keys[own]: value for own, value in seen.items()}
    return found


def adapted_places(model: nn.Module) -> dict[str, Place]:
    """Every module that holds adapters, of any kind of method, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Place)}


def adapted_modules(model: nn.Module) -> dict[str, Adapted]:
    """Every adapted module by path: also those of which an adapter only trains parameters whole."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}


def adapted_layers(model: nn.Module) -> dict[str, AdaptedSite]:
    """The modules that methods act on, by path."""
    return {name: m for name, m in adapted_modules(model).items() if isinstance(m, AdaptedSite) and m.adapters}


def _with_own(model: nn.Module, name: str) -> dict[str, AdaptedSite]:
    """The modules at which an adapter has parameters that no other module shares with it, by path."""
    held = {path: layer for path, layer in adapted_layers(model).items() if name in layer.adapters}
    return {path: layer for path, layer in held.items() if not isinstance(layer.adapters[name], TiedFactors)}


def outward_parameters(model: nn.Module) -> set[str]:
    """The names of those parameters of all adapters that are on the side of the output, as LoRA's B is."""
    return {
        f"{path}.adapters.{name}.{key}"
        for path, module in adapted_modules(model).items()
        for name, held in module.adapters.items()
        for key, _ in held.named_parameters()
        if key.rpartition(".")[2] in cast(LinearMethod, module.adapter_state.configs[name]).outward
    }


def embedding_parameters(model: nn.Module) -> set[str]:
    """The names of the parameters that adapters have at tables of embeddings."""
    return {
        f"{path}.adapters.{name}.{key}"
        for path, module in adapted_modules(model).items()
        if isinstance(module, AdaptedEmbedding)
        for name, held in module.adapters.items()
        for key, _ in held.named_parameters()
    }


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first parameter or buffer."""
    return next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _add_parameters(layer: AdaptedSite, name: str, allocation: Allocation) -> None:
    method, site = layer.method(name), layer.site((name,))
    dtype = layer.parameter_dtype(allocation.widen)
    holder = allocation.parameters(method.shapes(site), lambda: method.init(site), device_of(layer), dtype)
    for key in method.packing.fixed:  # a buffer: it moves and is saved with the adapter, and no optimizer sees it
        holder.register_buffer(key, holder.pop(key).detach())
    layer.adapters[name] = holder
