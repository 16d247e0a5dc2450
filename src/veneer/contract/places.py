"""The places where an adapter has parameters: a site, and the key that each of them has in the adapter's file."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, cast

from veneer.contract.config import MethodConfig
from veneer.contract.keys import SUBLAYER, Place, attention_path, copies_of, is_shared, parameter_key, place_of
from veneer.contract.linear import LinearMethod
from veneer.contract.residual import ResidualMethod
from veneer.contract.virtual_tokens import PrefixMethod, PromptMethod
from veneer.core.sites import AttentionSite, InputSite, LinearSite, ResidualSite, Site
from veneer.errors import FormatError

REPEATS = 2  # how often PEFT adds the update of an attention's output projection that is adapted with the attention
INPUT = "input"  # the name of the one place of virtual tokens
_SUBLAYER = re.compile(rf"(?:.*\.)?(\d+)\.{SUBLAYER}(attention|cross_attention|mlp)")
ShapesByKey = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Placed:
    """``sites`` are one, but for a prefix, which has all attention layers; ``keys`` by the names of the parameters,
    behind ``path`` where it is a linear layer.
    """

    sites: tuple[Site, ...]
    keys: Mapping[str, str]
    path: str = ""


def placed_linear(config: LinearMethod, site: LinearSite, path: str, depth: int = 0) -> Placed:
    """A linear layer, or a parameter that is adapted by its name; ``path`` and ``depth`` are those of the keys."""
    keys = {own: parameter_key(path, end, depth) for own, end in config.disk_names(site).items()}
    return Placed((site,), keys, path)


def placed_residual(config: ResidualMethod, site: ResidualSite) -> Placed:
    """A sub-layer."""
    return Placed((site,), {own: parameter_key(site.name, end) for own, end in config.disk_names(site).items()})


def placed_prefix(config: PrefixMethod, sites: tuple[AttentionSite, ...]) -> Placed:
    """All attention layers."""
    return Placed(sites, config.disk_names())


def placed_prompt(config: PromptMethod, site: InputSite) -> Placed:
    """The input embeddings."""
    return Placed((site,), config.disk_names())


def places_in(config: MethodConfig, shapes: ShapesByKey, source: str) -> dict[str, Placed] | None:
    """The places of an adapter by path, read from its file; None where that does not tell the sizes of all sites.

    ``config`` is that of the file, and ``source`` what errors call it. Layers of which a part is missing are left out.
    Raises FormatError where a parameter has a shape that tells nothing, or another number of layers than the config.
    """
    try:
        if isinstance(config, LinearMethod):
            return _linear_places(config, shapes)
        if isinstance(config, ResidualMethod):
            return _residual_places(config, shapes)
        if isinstance(config, PrefixMethod):
            sites = _prefix_sites(config, shapes)
            return None if sites is None else {INPUT: placed_prefix(config, sites)}
        return _prompt_places(config, shapes) if isinstance(config, PromptMethod) else None
    except _WrongShapeError as error:
        raise FormatError(f"{source}: {error}; save or download it again") from error


class _WrongShapeError(Exception):
    """A parameter has a shape that no layer gives it."""


def modules_in(config: MethodConfig, keys: Collection[str]) -> list[str]:
    """The modules that an adapter of these keys changes, by path."""
    ends: tuple[str, ...] = ()
    if isinstance(config, LinearMethod):
        ends = tuple(config.ends())
    elif isinstance(config, ResidualMethod):
        ends = tuple(config.disk_names(_any_sublayer()).values())
    shared = () if config.shared is None else config.shared.names
    written_again = {key for key in keys if any(own in keys for own in copies_of(key))}
    own = (key for key in keys if key not in written_again and not is_shared(key, shared))
    return sorted({place_of(key, ends).path for key in own} - {""})


def _linear_places(config: LinearMethod, shapes: ShapesByKey) -> dict[str, Placed] | None:
    if config.extras.parameters:  # which of a module's parameters a key means, its order in the module tells
        return None
    ends, found = config.ends(), dict[str, Placed]()
    for path, keys in _by_path(tuple(ends), shapes).items():
        first = next(iter(keys))
        name = path.rpartition(".")[0] if first.of_attention else path
        kind = cast(Literal["linear", "embedding"], ends[first.end])
        site = LinearSite(
            name=name, in_features=1, out_features=1, kind=kind, repeats=REPEATS if first.of_attention else 1
        )
        given = {place.end: shapes[key] for place, key in keys.items()}
        names = config.disk_names(site)
        if set(names.values()) <= given.keys():
            own = {name: given[end] for name, end in names.items()}
            _require_sizes(own, config.shapes(site), path)
            complete = config.site_of(site, own)
            if complete is None:
                return None
            found[path] = placed_linear(config, complete, attention_path(path) if first.of_attention else path)
    return found


def _by_path(ends: tuple[str, ...], shapes: ShapesByKey) -> dict[str, dict[Place, str]]:
    """The keys of a method's own parameters, by the path of their module."""
    found: dict[str, dict[Place, str]] = {}
    for key in shapes:
        place = place_of(key, ends)
        if place.end in ends and place.path:
            found.setdefault(place.path, {})[place] = key
    return found


def _residual_places(config: ResidualMethod, shapes: ShapesByKey) -> dict[str, Placed] | None:
    found: dict[str, Placed] = {}
    names = config.disk_names(_any_sublayer())
    for path, keys in _by_path(tuple(names.values()), shapes).items():
        given = {place.end: shapes[key] for place, key in keys.items()}
        match = _SUBLAYER.fullmatch(path)
        if match and set(names.values()) <= given.keys():
            own = {name: given[end] for name, end in names.items()}
            _require_sizes(own, config.shapes(_any_sublayer()), path)
            features = config.features(own)
            if features is None:
                return None
            sublayer = cast(Literal["attention", "cross_attention", "mlp"], match[2])
            site = ResidualSite(name=path, layer=int(match[1]), sublayer=sublayer, features=features)
            found[path] = placed_residual(config, site)
    return found


def _require_sizes(found: ShapesByKey, like: ShapesByKey, path: str) -> None:
    """Raise where a parameter is empty, or has fewer dimensions than one ``like`` it has at any site."""
    for name, shape in found.items():
        if 0 in shape or len(shape) < len(like[name]):
            raise _WrongShapeError(f"{name} of {path} has shape {shape}")


def _any_sublayer() -> ResidualSite:
    return ResidualSite(name="", layer=0, sublayer="mlp", features=1024)


def _prompt_places(config: PromptMethod, shapes: ShapesByKey) -> dict[str, Placed] | None:
    found = {name: shapes[key] for name, key in config.disk_names().items() if key in shapes}
    if not found:
        return None
    _require_sizes(found, config.shapes(InputSite(name=INPUT, features=1)), INPUT)
    return {INPUT: placed_prompt(config, InputSite(name=INPUT, features=next(iter(found.values()))[-1]))}


def _prefix_sites(config: PrefixMethod, shapes: ShapesByKey) -> tuple[AttentionSite, ...] | None:
    """Every layer of the base, as the config tells it once it has been on a model."""
    heads, width, layers = config.num_attention_heads, config.token_dim, config.num_layers
    if heads is None or width is None or layers is None or width % heads:
        return None
    columns = max((shape[-1] for shape in shapes.values() if shape), default=0)
    if layers > columns:  # each has columns of its own; told before so many sites are made
        raise _WrongShapeError(f"num_layers={layers} where no tensor has more than {columns} columns")
    cross = config.num_transformer_submodules == 2
    sites = (
        AttentionSite(name=f"layer {i}", layer=i, kv_heads=heads, head_dim=width // heads, cross=cross)
        for i in range(layers)
    )
    return tuple(sites)
