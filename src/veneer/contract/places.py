"""Places of an adapter's parameters: a site, and the key of each parameter in the adapter's file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from veneer.contract.keys import (
    Place,
    attention_path,
    copies_of,
    is_shared,
    parameter_key,
    place_of,
    shared_key,
    usual_key,
)
from veneer.contract.parameters import Shapes
from veneer.contract.shared import Shared
from veneer.errors import FormatError
from veneer.records.sites import Site

REPEATS = 2  # how often PEFT adds the update of an attention's output projection that is adapted with the attention
INPUT = "input"  # the name of the one place of virtual tokens
ShapesByKey = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Placed:
    """Site of an adapter with the keys of its parameters in the adapter's file.

    ``site`` is the argument of the method's functions. ``keys`` are those of the parameters, by their names. They
    follow ``path``, which is empty for virtual tokens.
    """

    site: Site
    keys: Mapping[str, str]
    path: str = ""


class Method(Protocol):
    """The functions of a method that determine the keys of its parameters, see `MethodConfig`."""

    def shapes(self, site: Any) -> Shapes: ...
    def disk_names(self, site: Any) -> Mapping[str, str]: ...
    def site_of(self, site: Any, shapes: ShapesByKey) -> Any: ...
    @property
    def samples(self) -> tuple[Site, ...]: ...
    @property
    def shared(self) -> Shared | None: ...


def placed(method: Method, site: Site, path: str = "", depth: int = 0) -> Placed:
    """Return a site with the keys of its parameters in the adapter's file.

    If ``path`` is given, the keys begin with it and have ``depth`` wrappers. If it is empty, a key is the parameter's
    name on disk alone.
    """
    ends, shared = method.disk_names(site), held_together(method)
    keys = {own: parameter_key(path, end, depth) if path else end for own, end in ends.items()}
    return Placed(site, keys | {own: shared_key(ends[own]) for own in shared}, path)


def held_together(method: Method) -> tuple[str, ...]:
    """Return the names of a layer's parameters that other layers share under the same key in the file."""
    shared = method.shared
    return shared.names if shared is not None and shared.is_held and shared.group is None else ()


def ends_of(method: Method) -> dict[str, Any]:
    """Return the ends that keys of this method have after a module's path, each with an example site that has it."""
    return {end: sample for sample in reversed(method.samples) for end in method.disk_names(sample).values()}


def modules_in(method: Method, keys: Collection[str]) -> list[str]:
    """Return the paths of the modules that an adapter with these keys changes."""
    ends, shared = ends_of(method), () if method.shared is None else method.shared.names
    keys = {usual_key(key) for key in keys}
    written_again = {key for key in keys if any(own in keys for own in copies_of(key))}
    own = (key for key in keys if key not in written_again and not is_shared(key, shared))
    return sorted({place_of(key, ends).path for key in own} - {""})


def module_places(
    method: Method, shapes: ShapesByKey, source: str, named: Callable[[Any, Place], Site | None]
) -> dict[str, Placed] | None:
    """Return the sites of a method at modules with their keys, read from its file as in `MethodConfig.places_in`.

    ``named`` turns an example site into the site of a parsed key, or returns None if no site has that name.
    """
    ends, found = ends_of(method), dict[str, Placed]()
    for path, keys in _by_path(ends, shapes).items():
        first = next(iter(keys))
        given = {place.end: shapes[key] for place, key in keys.items()}
        sites = [site for sample in method.samples if (site := named(sample, first)) is not None]
        shared = (method.disk_names(site)[own] for site in sites for own in held_together(method))
        given |= {end: shapes[key] for end in shared if (key := shared_key(end)) in shapes}
        fitting = [site for site in sites if set(method.disk_names(site).values()) <= given.keys()]
        if not fitting:
            continue
        site = max(fitting, key=lambda site: len(method.disk_names(site)))
        names = method.disk_names(site)
        own = {name: given[end] for name, end in names.items()}
        require_sizes(own, method.shapes(site), path, source)
        complete = method.site_of(site, own)
        if complete is None:
            return None
        found[path] = placed(method, complete, attention_path(path) if first.of_attention else path)
    return found


def require_sizes(found: ShapesByKey, like: ShapesByKey, path: str, source: str) -> None:
    """Raise FormatError if a parameter is empty, or has fewer dimensions than its shape in ``like``."""
    for name, shape in found.items():
        if 0 in shape or len(shape) < len(like[name]):
            raise damaged(source, f"{name} of {path} has shape {shape}")


def damaged(source: str, problem: str) -> FormatError:
    """Return the error for a file whose tensors have shapes that no layer gives them."""
    return FormatError(f"{source}: {problem}; save or download it again")


def _by_path(ends: Collection[str], shapes: ShapesByKey) -> dict[str, dict[Place, str]]:
    """Return, for each module path, the keys of the method's own parameters, each by its parsed form."""
    found: dict[str, dict[Place, str]] = {}
    for key in shapes:
        place = place_of(key, ends)
        if place.end in ends and place.path:
            found.setdefault(place.path, {})[place] = key
    return found
