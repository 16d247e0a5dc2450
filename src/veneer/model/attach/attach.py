"""Finds the modules of a transformers model that a config adapts, and puts adapters on them in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from veneer.contract import LinearMethod, MethodConfig
from veneer.contract.keys import parameter_key, shared_key
from veneer.contract.targets import ModuleIndex
from veneer.errors import AdapterNameError
from veneer.model.adapted.allocation import Allocation
from veneer.model.adapted.copies import add_copies
from veneer.model.adapted.embedding import AdaptedEmbedding
from veneer.model.adapted.holder import Holder
from veneer.model.adapted.kinds import adapt_module
from veneer.model.adapted.linear import AdaptedSite
from veneer.model.adapted.parameters import AdaptedParameters
from veneer.model.adapted.site import Adapted, TiedFactors
from veneer.model.adapted.state import AdapterState
from veneer.model.adapted.token_rows import add_rows
from veneer.model.modules.plan import AttachPlan
from veneer.model.modules.snapshot import Snapshot, look_at
from veneer.model.sites.places import plan_of, put_on


def module_index(model: nn.Module, method: LinearMethod | None = None) -> ModuleIndex:
    """Return all module paths of a model, and the paths of the modules that ``method`` can adapt. Without a method,
    these are all that some method can adapt.

    They are linear layers, and other kinds that the method supports. ``"all-linear"`` selects linear layers alone,
    without the output head.
    """
    return look_at(model).index(method)


def attach(
    model: nn.Module, config: MethodConfig, name: str, state: AdapterState, allocation: Allocation | None = None
) -> None:
    """Add one adapter's parameters at all of its config's targets. If one fails, the adapter is removed from all.

    Initial values are drawn from torch's global random generator. Raises AdapterNameError for a bad name, and
    TargetError if the config does not fit the model.
    """
    check_name(name, state)
    allocation = allocation or Allocation()
    snapshot = look_at(model)
    plan = plan_of(snapshot, config, fresh=allocation.values)
    state.configs[name] = plan.config
    try:
        _put_on(snapshot, name, state, plan, allocation)
    except BaseException:
        detach(model, state, name)
        raise


def _put_on(snapshot: Snapshot, name: str, state: AdapterState, plan: AttachPlan, allocation: Allocation) -> None:
    model = snapshot.model
    for path in plan.modules:
        adapt_path(model, path, state)
    add_copies(model, name, plan.copied, allocation.widen)
    add_rows(model, name, plan.rows, values=allocation.values, widen=allocation.widen)
    put_on(snapshot, name, state, plan, allocation)


def adapt_path(model: nn.Module, path: str, state: AdapterState) -> Adapted:
    """Return the module at a path, adapted according to its kind."""
    return adapt_module(path, model.get_submodule(path), state)


def check_name(name: str, state: AdapterState) -> None:
    """Raise AdapterNameError if a name is taken, or cannot name a module and a folder."""
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
    """Remove one adapter, with its settings and tensors. A module without other adapters becomes as it was before."""
    del state.configs[name]
    state.schedules.pop(name, None)
    state.tasks.pop(name, None)
    state.trainable.discard(name)
    state.active = tuple(n for n in state.active if n != name)
    for path, place in adapted_places(model).items():
        place.take_off(model, path, name)


def live_parameters(model: nn.Module, state: AdapterState, name: str) -> dict[str, Tensor]:
    """Return every tensor of one adapter, of any kind of method, by its key on disk: the parameters
    themselves, not copies.
    """
    return {key: tensor for key, (_, tensor) in named_live_parameters(model, name).items()}


def named_live_parameters(model: nn.Module, name: str) -> dict[str, tuple[str, Tensor]]:
    """Return `live_parameters`, each with its name in the model's own ``state_dict``."""
    places = adapted_places(model).items()
    return {key: tensor for path, place in places for key, tensor in place.live_tensors(name, path).items()}


def stored_tensors(
    model: nn.Module, state: AdapterState, name: str, values: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the tensors of one adapter in the form of its file, by their keys on disk. They include the tensors that
    its layers share, if the method saves them.

    ``values`` replace `live_parameters`.
    """
    config = state.configs[name]
    found = {config.written_key(key): value for key, value in packed_tensors(model, state, name, values).items()}
    if config.shared is None or not config.shared.is_saved:
        return found
    drawn = shared_tensors(config)
    return found | drawn | {key: drawn[own] for key, own in shared_again(model, config, name).items()}


def packed_tensors(
    model: nn.Module, state: AdapterState, name: str, values: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return `stored_tensors` without the random tensors that all layers share, under the method's own keys."""
    found = live_parameters(model, state, name) if values is None else dict(values)
    for place in adapted_places(model).values():
        if place.owns(name):
            packed = place.packed(name, found)
            for key in place.disk_keys(name).values():
                del found[key]
            found |= packed
    return found | repeated_tensors(model, name, found)


def shared_tensors(config: MethodConfig) -> dict[str, Tensor]:
    """Return the tensors that the layers of an adapter share, by their keys on disk; empty if there are none."""
    return {} if config.shared is None else {shared_key(key): value for key, value in config.shared.draw().items()}


def shared_again(model: nn.Module, config: MethodConfig, name: str) -> dict[str, str]:
    """Return the keys under which PEFT writes each shared tensor a second time, for every layer. Each key is mapped to
    the key of the shared tensor.
    """
    if config.shared is None or not config.shared.is_repeated:
        return {}
    paths = [layer.disk_path(name, path) for path, layer in adapted_layers(model).items() if name in layer.adapters]
    return {parameter_key(path, own): shared_key(own) for path in paths for own in config.shared.names}


def unpacked_tensors(model: nn.Module, name: str, written: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a value for each of `live_parameters` from the tensors of a file: the inverse of `stored_tensors`."""
    found = dict(written)
    for place in adapted_places(model).values():
        if place.owns(name):
            found |= place.unpacked(name, written)
    return found


def value_problems(model: nn.Module, name: str, written: Mapping[str, Tensor]) -> list[str]:
    """Return what is wrong with the values of an adapter's tensors ``written`` in a file, as sentences. Shapes and
    dtypes are not checked here.

    See `Packing.problems`.
    """
    return [
        problem
        for place in adapted_places(model).values()
        if place.owns(name)
        for problem in place.value_problems(name, written)
    ]


def repeated_tensors(model: nn.Module, name: str, written: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that PEFT writes again for modules tied to the embeddings, by key. They are made from the
    embeddings' tensors in ``written``.
    """
    found: dict[str, Tensor] = {}
    for layer in adapted_layers(model).values():
        held = dict(layer.adapters.items()).get(name)
        if isinstance(held, TiedFactors):
            source = cast(AdaptedSite, model.get_submodule(held.source))
            keys, theirs = layer.disk_keys(name), source.disk_keys(name)
            if all(key in written for key in theirs.values()):
                seen = held.seen({own: written[key] for own, key in theirs.items()})
                found |= {keys[own]: value for own, value in seen.items()}
    return found


def adapted_places(model: nn.Module) -> dict[str, Holder]:
    """Return every module that holds adapters, of any kind of method, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Holder)}


def adapted_modules(model: nn.Module) -> dict[str, Adapted]:
    """Return every adapted module by path, including those in which an adapter only trains whole parameters."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}


def adapted_layers(model: nn.Module) -> dict[str, AdaptedSite]:
    """Return the linear layers and similar modules that adapters change, by path."""
    return {name: m for name, m in adapted_modules(model).items() if isinstance(m, AdaptedSite) and m.adapters}


def adapted_stacks(model: nn.Module) -> dict[str, AdaptedParameters]:
    """Return, by path, the modules some of whose own parameters, such as stacked experts, are adapted."""
    return {name: m for name, m in adapted_modules(model).items() if isinstance(m, AdaptedParameters)}


def outward_parameters(model: nn.Module) -> set[str]:
    """Return the names of all adapters' parameters on the output side, such as LoRA's B."""
    return {
        f"{path}.adapters.{name}.{key}"
        for path, module in adapted_modules(model).items()
        for name, held in module.adapters.items()
        for key, _ in held.named_parameters()
        if key.rpartition(".")[2] in cast(LinearMethod, module.adapter_state.configs[name]).outward
    }


def embedding_parameters(model: nn.Module) -> set[str]:
    """Return the names of the adapters' parameters in embedding tables."""
    return {
        f"{path}.adapters.{name}.{key}"
        for path, module in adapted_modules(model).items()
        if isinstance(module, AdaptedEmbedding)
        for name, held in module.adapters.items()
        for key, _ in held.named_parameters()
    }
