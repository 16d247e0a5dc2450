"""Target matching: names, suffixes and expressions on module paths, with PEFT's rules."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from veneer.contract.config import MethodConfig
from veneer.contract.known import Names as Names  # methods look for it here
from veneer.errors import TargetError, listed
from veneer.plain.module_names import matches_any, nearest_modules

ALL_LINEAR = "all-linear"
FamilyTargets = Mapping[str, Mapping[str, Names]]
_LETTERS = re.compile(r"[^a-z]")


@dataclass(frozen=True, kw_only=True)
class TargetedConfig(MethodConfig):
    """Config that selects modules by name.

    ``target_modules`` is a list of names or suffixes, such as [q_proj, v_proj], or a regular expression that must match
    the whole module path. It may be ``"all-linear"``: every linear layer except the output head. None selects those of
    the method's ``default_targets`` that the model has. ``family_targets`` are defaults by transformers' type of model.
    A method overrides `fields_for` if other fields that name modules have defaults. ``exclude_modules``: names,
    suffixes or a regular expression of modules that are not adapted although they are targets. ``layers_to_transform``
    keeps only the layers with these indices. ``layers_pattern``: name of the list of layers that
    ``layers_to_transform`` counts, such as "layers".
    """

    changes_weights: ClassVar[bool] = True
    inert: ClassVar[frozenset[str]] = frozenset(
        {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
    )
    headline: ClassVar[tuple[str, ...]] = ("target_modules",)
    default_targets: ClassVar[tuple[str, ...]] = ("q", "v")  # names, or roles in a decoder (Hu et al. 2021, sec. 4.2)
    family_targets: ClassVar[FamilyTargets] = {}
    takes_any_linear: ClassVar[bool] = False  # by default, in a model that has none of the default targets

    target_modules: Collection[str] | str | None = None
    exclude_modules: Collection[str] | str | None = None
    layers_to_transform: Collection[int] | int | None = None
    layers_pattern: Collection[str] | str | None = None

    def problems(self) -> list[str]:
        found = super().problems()
        for name in ("target_modules", "exclude_modules"):
            pattern = getattr(self, name)
            if isinstance(pattern, str) and pattern != "all-linear":
                try:
                    re.compile(pattern)
                except re.error as error:
                    found.append(f"{name}={pattern!r} is not a regular expression ({error}): correct it")
        if self.layers_pattern and self.layers_to_transform is None:
            found.append(
                "layers_pattern is given without layers_to_transform: give the indices too, or drop the pattern"
            )
        return found

    @classmethod
    def fields_for(cls, model_type: str) -> Mapping[str, Names]:
        """Return the defaults of the fields that name modules, for a model of this type in transformers.

        They replace fields that are None. Names and roles that the model does not have are ignored.
        """
        return {"target_modules": cls.default_targets, **cls.family_targets.get(model_type, {})}


@dataclass(frozen=True)
class ModuleIndex:
    """Module paths of a model: all of them, those that a method can adapt, and those of ``"all-linear"``."""

    all_names: tuple[str, ...]
    adaptable: tuple[str, ...]
    all_linear: tuple[str, ...]
    called: str = "Linear layers"  # what can be adapted, in messages

    @property
    def endings(self) -> str:
        """Return the last names of the modules that can be adapted, as a sentence."""
        names = sorted({name.rpartition(".")[2] for name in self.adaptable})
        return f"{self.called} of this model end with: {', '.join(names)}"


def present_targets(config: TargetedConfig, index: ModuleIndex, default: Collection[str]) -> tuple[str, ...]:
    """Return the default names that the model has. Raises TargetError if it has none."""
    present = tuple(p for p in default if any(matches_any(n, (p,)) for n in index.adaptable))
    if present:
        return present
    raise TargetError(
        f"{type(config).__name__} has no default target_modules for this model, which has none of {list(default)}: "
        f"name some. {index.endings}"
    )


def select_targets(config: TargetedConfig, index: ModuleIndex) -> tuple[str, ...]:
    """Return the module paths that a config adapts, in the model's order.

    ``layers_to_transform`` does not restrict modules that are named by their whole path. Modules to be saved whole are
    never adapted. Both are PEFT's rules.

    Raises TargetError, with every problem, if a pattern matches nothing (naming the nearest module names) or only
    modules that cannot be adapted. Raises it too if exclusions or layer indices leave nothing.
    """
    patterns = _patterns(config, index)
    problems = _unmatched("target", patterns, index.adaptable, index) if patterns != ALL_LINEAR else []
    problems += _unmatched("excluded", config.exclude_modules or (), index.all_names, index)
    if problems:
        raise TargetError(listed(problems))
    meant = (
        tuple(n for n in index.adaptable if matches_any(n, patterns)) if patterns != ALL_LINEAR else index.all_linear
    )
    kept = tuple(n for n in meant if not _excluded(n, config))
    if not kept:
        raise TargetError(
            f"exclude_modules={_show(config.exclude_modules)} and modules_to_save={_show(config.modules_to_save)} "
            f"leave nothing of target_modules={_show(patterns)}: narrow the exclusions or widen the targets"
        )
    chosen = tuple(n for n in kept if _in_layers(n, config, patterns))
    if not chosen:
        raise TargetError(
            f"layers_to_transform={config.layers_to_transform!r} (layers_pattern={config.layers_pattern!r}) matches no "
            f"layer of the {len(kept)} target modules, such as {kept[0]!r}: {_layers(kept)}"
        )
    return chosen


def absent_layers(config: TargetedConfig, index: ModuleIndex) -> list[str]:
    """Return a sentence if ``layers_to_transform`` holds layers that the model does not have, adaptable or not."""
    wanted = config.layers_to_transform
    asked = set() if wanted is None else {wanted} if isinstance(wanted, int) else set(wanted)
    absent = sorted(asked - {_layer(name, config) for name in index.all_names})
    there = _layers(index.all_names)
    return [f"layers_to_transform holds {absent}, but the model has no such layers: {there}"] if absent else []


def _patterns(config: TargetedConfig, index: ModuleIndex) -> Collection[str] | str:
    if not config.target_modules:
        raise TargetError(f"target_modules is empty: name some. {index.endings}")
    given = config.target_modules
    if isinstance(given, str) and given.lower() != ALL_LINEAR and _LETTERS.sub("", given.lower()) == "alllinear":
        raise TargetError(
            f"target_modules={given!r} is unknown: give {ALL_LINEAR!r} for every linear layer except the output head"
        )
    return ALL_LINEAR if isinstance(given, str) and given.lower() == ALL_LINEAR else given


def _unmatched(role: str, patterns: Collection[str] | str, allowed: Sequence[str], index: ModuleIndex) -> list[str]:
    """Return a sentence for each pattern that matches none of the allowed names."""
    tests = [(patterns, patterns)] if isinstance(patterns, str) and patterns else [(p, (p,)) for p in patterns]
    return [
        _no_match(role, shown, test, allowed, index)
        for shown, test in tests
        if not any(matches_any(n, test) for n in allowed)
    ]


def _no_match(role: str, pattern: str, test: Collection[str] | str, allowed: Sequence[str], index: ModuleIndex) -> str:
    other = next((n for n in index.all_names if matches_any(n, test)), None)
    if other is not None:
        return (
            f"{role} module {pattern!r} matches only modules that cannot be adapted, such as {other!r}. {index.endings}"
        )
    hints = nearest_modules(pattern, allowed)
    near = f" (nearest: {', '.join(hints)})" if hints else f". {index.endings}"
    rule = ". A string is a regular expression for whole paths: names go into a list" if test == pattern else ""
    return f"{role} module {pattern!r} matches no module of the model{near}{rule}"


def _excluded(name: str, config: TargetedConfig) -> bool:
    if config.exclude_modules and matches_any(name, config.exclude_modules):
        return True
    return any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in config.modules_to_save or ())


def _in_layers(name: str, config: TargetedConfig, patterns: Collection[str] | str) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or wanted == () or (not isinstance(patterns, str) and name in patterns):
        return True
    return _layer(name, config) in ((wanted,) if isinstance(wanted, int) else wanted)


def _layer(name: str, config: TargetedConfig) -> int | None:
    """Return the number of a module's layer: the first index on its path. Later indices count experts and the like."""
    given = config.layers_pattern or (r"[^.]*",)
    found = (re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", name) for p in ((given,) if isinstance(given, str) else given))
    return next((int(match.group(1)) for match in found if match), None)


def _layers(names: Iterable[str]) -> str:
    """Return the blocks that hold the modules, in words such as ``they lie in layers.0 to layers.11``."""
    found: dict[str, set[int]] = {}
    for match in filter(None, (re.match(r"(?:^|.*?\.)([^.]*)\.(\d+)\.", name) for name in names)):
        found.setdefault(match.group(1), set()).add(int(match.group(2)))
    ranges = (f"{each}.{min(indices)} to {each}.{max(indices)}" for each, indices in found.items())
    return "they lie in " + (", ".join(ranges) or "no list of layers")


def _show(patterns: object) -> str:
    return repr(list(patterns)) if isinstance(patterns, tuple) else repr(patterns)
