"""Finding the sites of a transformers model and putting adapters on them, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.core.method import (
    DISK_PREFIX,
    WRAPPER,
    LinearMethod,
    MethodConfig,
    PrefixMethod,
    PromptMethod,
    ResidualMethod,
    TargetedConfig,
    VirtualTokenMethod,
)
from veneer.core.sites import LinearSite
from veneer.core.targets import ALL_LINEAR, ModuleIndex, absent_layers, matches_any, select_targets
from veneer.errors import AdapterNameError, TargetError
from veneer.model.adapted import Adapted, TiedFactors, adapt, restore, tensors_of
from veneer.model.convolution import AdaptedConvolution, is_convolution, shape_of_convolution
from veneer.model.copies import CLASSIFIERS, add_copies, copied_parameters, is_ours
from veneer.model.default_targets import defaults_for
from veneer.model.embedding import AdaptedEmbedding, is_embedding
from veneer.model.linear import AdaptedLinear, AdaptedSite, frozen_weight, is_linear
from veneer.model.multihead import (
    OUT_PROJECTION,
    adapt_attention,
    adapt_out_projection,
    is_attention,
    is_out_projection,
    shape_of_attention,
)
from veneer.model.parameters import AdaptedParameters, add_parameters, parameter_places
from veneer.model.prefix import PrefixAdapters, attach_prefix
from veneer.model.prompt import PromptAdapters, attach_prompt
from veneer.model.residual import ResidualAdapters, attach_residual, detach_residual
from veneer.model.start import Start as Start  # from here for those who attach
from veneer.model.state import AdapterState
from veneer.model.token_rows import RowPlace, add_rows, row_places
from veneer.model.tying import follow, followers_of, tied_modules, unused_tie
from veneer.model.virtual_tokens import VirtualTokens, detach_virtual_tokens, virtual_tokens

_HEADS = {"SEQ_CLS": CLASSIFIERS, "TOKEN_CLS": CLASSIFIERS, "QUESTION_ANS": ("qa_outputs",)}


Place = Adapted | ResidualAdapters | PrefixAdapters | PromptAdapters


def module_index(model: nn.Module, method: LinearMethod | None = None) -> ModuleIndex:
    """The module paths of a model, and which of them a method (None: any) can adapt: linear layers, and what else it
    knows. ``"all-linear"`` takes linear layers alone, without the output head."""
    names = {name: module for name, module in model.named_modules() if name and not is_ours(name)}
    linear = tuple(name for name, module in names.items() if is_linear(module))
    known = {
        is_embedding: method is None or method.adapts_embeddings,
        is_convolution: method is None or method.adapts_convolutions,
        is_attention: method is None or method.adapts_attention,
    }
    kinds = [is_linear, *(is_kind for is_kind, can in known.items() if can)]
    adaptable = tuple(name for name, module in names.items() if any(is_kind(module) for is_kind in kinds))
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    heads = [head, *(m for n, m in names.items() if n in CLASSIFIERS)]
    return ModuleIndex(
        all_names=tuple(names),
        adaptable=adaptable,
        all_linear=tuple(n for n in linear if not any(names[n] is h for h in heads)),
    )


def targets_of(model: nn.Module, config: MethodConfig) -> tuple[str, ...]:
    """The module paths that a linear method's config means in this model."""
    if not isinstance(config, LinearMethod):
        raise TargetError(f"{type(config).__name__} does not target modules by name")
    if config.adapted_parameters and not config.target_modules:
        return ()
    index = module_index(model, config)
    return select_targets(config, index, config.default_targets)


def resolved(model: nn.Module, config: MethodConfig) -> MethodConfig:
    """The config with what it leaves to the model filled in: default targets, ``"all-linear"`` as names, the head that
    a classification task trains, the name of the base."""
    changes: dict[str, object] = {}
    base: Any = getattr(model, "config", None)
    model_type, base_name = str(getattr(base, "model_type", "")), getattr(base, "name_or_path", "")
    if config.base_model_name_or_path is None and base_name:
        changes["base_model_name_or_path"] = str(base_name)
    if isinstance(config, TargetedConfig):
        if config.target_modules is None and not (isinstance(config, LinearMethod) and config.adapted_parameters):
            defaults = defaults_for(config.peft_type, model_type)
            changes |= {name: value for name, value in defaults.items() if getattr(config, name) is None}
        elif isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
            changes["target_modules"] = shortest_names(module_index(model), targets_of(model, config))
    heads = [h for h in _HEADS.get(config.task_type or "", ()) if h in dict(model.named_children())]
    missing = [head for head in heads if head not in (config.modules_to_save or ())]
    if missing:
        changes["modules_to_save"] = (*(config.modules_to_save or ()), *missing)
    return replace(config, **changes)  # type: ignore[arg-type]


def shortest_names(index: ModuleIndex, chosen: tuple[str, ...]) -> tuple[str, ...]:
    """The last parts of the paths where they mean exactly these modules, otherwise the paths."""
    endings = tuple(sorted({path.rpartition(".")[2] for path in chosen}))
    meant = {name for name in index.all_names if matches_any(name, endings)}
    return endings if meant == set(chosen) else chosen


@dataclass(frozen=True, kw_only=True)
class _Places:
    """Where one adapter goes.

    ``targets``: the layers that its config means, by path; ``outward``: the output projections of the attentions among
    them; ``followers``: the modules that share a target's factors. ``parameters``: those that are adapted by name, and
    ``copied``: those that are trained whole, by module path; ``rows``: the tables of which rows are trained.
    """

    targets: tuple[str, ...]
    outward: tuple[str, ...]
    followers: tuple[str, ...]
    parameters: dict[str, tuple[str, ...]]
    copied: dict[str, list[str]]
    rows: tuple[RowPlace, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that get factors of their own."""
        return tuple(dict.fromkeys((*self.targets, *self.outward)))

    @property
    def modules(self) -> tuple[str, ...]:
        """Every module that the adapter touches."""
        with_rows = [path for place in self.rows for path in (place.path, *place.followers)]
        return tuple(dict.fromkeys([*self.layers, *self.followers, *self.parameters, *self.copied, *with_rows]))


def attach(model: nn.Module, config: MethodConfig, name: str, state: AdapterState, start: Start | None = None) -> None:
    """Add one adapter's parameters wherever its config means, all or nothing.

    They are drawn from torch's global generator. Raises AdapterNameError and TargetError.
    """
    check_name(name, state)
    start = start or Start()
    state.configs[name], places = _placed(model, resolved(model, config), start)
    try:
        _put_on(model, name, state, places, start)
    except BaseException:
        detach(model, state, name)
        raise


def _placed(model: nn.Module, config: MethodConfig, start: Start) -> tuple[MethodConfig, _Places]:
    """The config for this model, and its places there. Raises TargetError with what is wrong."""
    targets = targets_of(model, config) if isinstance(config, LinearMethod) else ()
    targets, followers = followers_of(model, config, targets)
    outward = tuple(f"{path}{OUT_PROJECTION}" for path in targets if is_attention(model.get_submodule(path)))
    copied = copied_parameters(cast(PreTrainedModel, model), config, {*targets, *outward})
    parameters, by_weight = parameter_places(model, config, {*targets, *copied})
    places = _Places(
        targets=(*targets, *by_weight), outward=outward, followers=followers, parameters=parameters, copied=copied
    )
    if isinstance(config, LinearMethod):
        sites = _sites(model, places.targets)
        wrong = [*config.refused(sites), *(config.torn(_sites(model, tied_modules(model))) if followers else [])]
        if start.values:  # a saved one is as it is
            wrong += _without_effect(model, config, places, sites)
        if wrong:
            raise TargetError("; ".join(wrong))
        config = config.for_sites(sites)
    whole = (path for path, keys in copied.items() if "weight" in keys)
    return config, replace(places, rows=row_places(model, config, {*places.layers, *followers, *whole}))


def _without_effect(model: nn.Module, config: LinearMethod, places: _Places, sites: Sequence[LinearSite]) -> list[str]:
    """A sentence for everything in the config that changes nothing at these places."""
    named = [f"{path}.{key}" for path, keys in places.parameters.items() for key in keys]
    return [
        *unused_tie(model, config, {*places.targets, *places.copied}),
        *config.unused([*places.targets, *places.followers, *named]),
        *config.misfits(sites),
        *absent_layers(config, module_index(model)),
    ]


def _put_on(model: nn.Module, name: str, state: AdapterState, places: _Places, start: Start) -> None:
    for path in places.modules:
        adapt_path(model, path, state)
    whole, config = cast(PreTrainedModel, model), state.configs[name]
    add_copies(whole, name, places.copied, start.widen)
    add_rows(model, name, places.rows, values=start.values, widen=start.widen)
    for path in places.layers:
        _add_parameters(cast(AdaptedSite, model.get_submodule(path)), name, start)
    follow(model, name, places.followers)
    add_parameters(model, name, places.parameters, start)
    if isinstance(config, ResidualMethod):
        attach_residual(whole, name, state, start)
    elif isinstance(config, PrefixMethod):
        attach_prefix(whole, name, state, start)
    elif isinstance(config, PromptMethod):
        attach_prompt(whole, name, state, start)
    elif not isinstance(config, LinearMethod):
        raise TargetError(f"{type(config).__name__} is none of the kinds of method that a model can take")


def _sites(model: nn.Module, paths: Sequence[str]) -> list[LinearSite]:
    return [shape_of(path, model.get_submodule(path)) for path in paths]


def shape_of(path: str, module: nn.Module) -> LinearSite:
    """A layer that can be adapted, described by its shape alone."""
    if is_linear(module):
        o, i = frozen_weight(module).shape
        return LinearSite(name=path, in_features=i, out_features=o)
    if is_convolution(module):
        return shape_of_convolution(path, module)
    if is_attention(module):
        return shape_of_attention(path, module)
    vocabulary, width = cast(Tensor, module.weight).shape
    return LinearSite(name=path, in_features=vocabulary, out_features=width, kind="embedding")


def adapt_path(model: nn.Module, path: str, state: AdapterState) -> Adapted:
    """The module at a path, made adapted in the way that its type asks for."""
    module = model.get_submodule(path)
    mixin: type[Adapted] = AdaptedParameters
    if is_attention(module):
        return adapt_attention(path, module, state)
    if is_out_projection(module):
        return adapt_out_projection(path, module, state)
    if is_linear(module):
        mixin = AdaptedLinear
    elif is_embedding(module):
        mixin = AdaptedEmbedding
    elif is_convolution(module):
        mixin = AdaptedConvolution
    return adapt(path, module, state, mixin)


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


def disk_prefix(config: MethodConfig) -> str:
    """What PEFT's wrappers put in front of a module's path: virtual tokens have one wrapper, others one more."""
    return WRAPPER if isinstance(config, VirtualTokenMethod) else DISK_PREFIX


def named_live_parameters(model: nn.Module, name: str) -> dict[str, tuple[str, Tensor]]:
    """As `live_parameters`, each with its name in the model's own ``state_dict``."""
    found: dict[str, tuple[str, Tensor]] = {}
    for path, place in adapted_places(model).items():
        if name in place.adapters:
            keys = place.disk_keys(name, path)
            held = tensors_of(place.adapters[name])
            found |= {keys[key]: (f"{path}.adapters.{name}.{key}", value) for key, value in held.items()}
        if isinstance(place, Adapted) and name in place.copies:
            inner = "base_layer." if name in place.adapters else ""
            start = f"{disk_prefix(place.adapter_state.configs[name])}{place.disk_path(name, path)}"
            found |= {
                f"{start}.{inner}{key}": (f"{path}.copies.{name}.{key}", value)
                for key, value in tensors_of(place.copies[name]).items()
            }
    return found


def stored_tensors(
    model: nn.Module, state: AdapterState, name: str, values: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What a plain save of one adapter holds, by its key on disk: the parameters, or what the method packs them into.

    ``values`` stand in for `live_parameters`.
    """
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
    found |= repeated_tensors(model, name, found)
    config = state.configs[name]
    return found | config.shared() if isinstance(config, LinearMethod) and config.saves_shared else found


def unpacked_tensors(model: nn.Module, name: str, written: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `stored_tensors`: a value for each of `live_parameters`."""
    found = dict(written)
    for path, layer in _with_own(model, name).items():
        found |= layer.unpacked(name, path, written)
    return found


def repeated_tensors(model: nn.Module, name: str, written: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What PEFT writes once more for modules that share an adapter with the embeddings, from what it writes there."""
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


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first parameter or buffer."""
    return next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _add_parameters(layer: AdaptedSite, name: str, start: Start) -> None:
    method, site = layer.method(name), layer.site((name,))
    dtype = layer.parameter_dtype(start.widen)
    holder = start.parameters(method.shapes(site), lambda: method.init(site), device_of(layer), dtype)
    for key in method.fixed(site):  # a buffer: it moves and is saved with the adapter, and no optimizer sees it
        holder.register_buffer(key, holder.pop(key).detach())
    layer.adapters[name] = holder
