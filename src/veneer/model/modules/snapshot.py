"""Snapshot of a model: its modules by path, their kinds, and those that share one weight."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from veneer.contract import LinearMethod
from veneer.contract.targets import ModuleIndex
from veneer.model.adapted.embedding import input_embeddings
from veneer.model.adapted.kinds import Kind, kind_of
from veneer.model.adapted.site import own_parameter
from veneer.model.blueprint.names import CLASSIFIERS
from veneer.model.inplace import plain_class
from veneer.plain.module_names import matches_any
from veneer.records.sites import LinearSite

_HOLDERS = {"adapters", "copies"}


@dataclass(frozen=True)
class Snapshot:
    """Facts of a ``model``, read once.

    ``modules``: the base's modules by path, without those that adapters added; ``kinds``: the kinds of those that can
    be adapted. ``tied``: the input embeddings, then the modules that share their weight. ``heads``: the output head and
    classification heads. ``model_type`` is that of transformers, ``base_name`` the source from which the model was
    loaded.
    """

    model: nn.Module
    modules: Mapping[str, nn.Module]
    kinds: Mapping[str, Kind]
    tied: tuple[str, ...]
    heads: tuple[str, ...]
    model_type: str
    base_name: str

    def sites(self, paths: Sequence[str]) -> list[LinearSite]:
        """Describe the modules at these paths as linear maps, by names and shapes, without their weights."""
        return [self.kinds[path].site(path, self.modules[path]) for path in paths]

    def wholes(self) -> ModuleIndex:
        """Return all module paths, and the paths of modules that hold parameters."""
        own = tuple(path for path, module in self.modules.items() if module._parameters)
        return ModuleIndex(all_names=tuple(self.modules), adaptable=own, all_linear=(), called="Modules with weights")

    def index(self, method: LinearMethod | None = None) -> ModuleIndex:
        """Return all module paths, and the paths of the modules that ``method`` can adapt. Without a method, these are
        all that some method can adapt.
        """
        known = {path for path, kind in self.kinds.items() if method is None or kind.name in method.kinds}
        linear = (path for path, kind in self.kinds.items() if kind.name == "linear" and not self._is_uncalled(path))
        return ModuleIndex(
            all_names=tuple(self.modules),
            adaptable=tuple(path for path in self.modules if path in known),
            all_linear=tuple(path for path in linear if path not in self.heads),
        )

    def _is_uncalled(self, path: str) -> bool:
        """Return True if the code around a layer multiplies by its weight without calling it, as Mamba does with
        ``dt_proj``.
        """
        parent, _, name = path.rpartition(".")
        return parent in self.modules and name in _read_weights(cast(Hashable, plain_class(type(self.modules[parent]))))


@functools.cache
def _read_weights(kind: Hashable) -> frozenset[str]:
    """Return the names of layers whose weights a class's methods use directly, without calling the layers.

    The source is read method by method, because for a whole class `inspect` would parse the whole file, which takes
    half a second.
    """
    methods = [each for each in vars(cast(Any, kind)).values() if inspect.isfunction(each)]
    return frozenset(name for each in methods for names in _PRODUCT.findall(_source(each)) for name in names if name)


def _source(method: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(method)
    except (OSError, TypeError):
        return ""


# A product with a layer's weight: `self.name.weight @ x`, `linear(x, self.name.weight)`, or after it was clamped.
_PRODUCT = re.compile(
    r"self\.(\w+)\.weight @ |\blinear\([^\n]*?self\.(\w+)\.weight|\bweight = self\.(\w+)\.weight\.clamp\("
)


def look_at(model: nn.Module) -> Snapshot:
    """Return a snapshot of a model, with or without adapters on it."""
    modules = {path: m for path, m in model.named_modules() if path and not _HOLDERS & set(path.split(".")[1:])}
    kinds = {path: kind for path, module in modules.items() if (kind := kind_of(module)) is not None}
    whole = model if isinstance(model, PreTrainedModel) else None
    head = None if whole is None else whole.get_output_embeddings()
    config: Any = getattr(model, "config", None)
    return Snapshot(
        model=model,
        modules=modules,
        kinds=kinds,
        tied=() if whole is None else _tied(modules, input_embeddings(whole)),
        heads=tuple(path for path, module in modules.items() if module is head or path in CLASSIFIERS),
        model_type=str(getattr(config, "model_type", "")),
        base_name=str(getattr(config, "name_or_path", "")),
    )


def shortest_names(index: ModuleIndex, chosen: tuple[str, ...]) -> tuple[str, ...]:
    """Return the last parts of the chosen paths if these names match exactly the chosen modules. Otherwise return the
    paths themselves.
    """
    endings = tuple(sorted({path.rpartition(".")[2] for path in chosen}))
    meant = {name for name in index.all_names if matches_any(name, endings)}
    return endings if meant == set(chosen) else chosen


def _tied(modules: Mapping[str, nn.Module], table: nn.Module | None) -> tuple[str, ...]:
    if table is None:
        return ()
    weight = own_parameter(table, "weight")
    first = (path for path, module in modules.items() if module is table)
    sharing = (
        path for path, module in modules.items() if weight is not None and own_parameter(module, "weight") is weight
    )
    return tuple(dict.fromkeys((*first, *sharing)))
