"""Which modules a config means: pure matching on module paths, with PEFT's rules."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from veneer.core.method import TargetedConfig
from veneer.errors import TargetError

ALL_LINEAR = "all-linear"


def matches_any(name: str, patterns: Sequence[str] | str) -> bool:
    """Whether a module path is meant: by a regular expression (a string, matched whole), or by names or suffixes."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


@dataclass(frozen=True)
class ModuleIndex:
    """The module paths of a model: all of them, those that a method can adapt, and those ``"all-linear"`` takes."""

    all_names: tuple[str, ...]
    adaptable: tuple[str, ...]
    all_linear: tuple[str, ...]


def select_targets(config: TargetedConfig, index: ModuleIndex, default: Sequence[str]) -> tuple[str, ...]:
    """The module paths that a config adapts, in the model's order.

    Raises TargetError where a pattern matches nothing (naming the nearest module names), or matches only modules that
    cannot be adapted.
    """
    patterns = default if config.target_modules is None else config.target_modules
    meant = (
        index.all_linear if patterns == ALL_LINEAR else tuple(n for n in index.all_names if matches_any(n, patterns))
    )
    _require_each_pattern_to_match(patterns, index)
    kept = tuple(n for n in meant if not (config.exclude_modules and matches_any(n, config.exclude_modules)))
    if meant and not kept:
        raise TargetError(
            f"exclude_modules={_show(config.exclude_modules)} leaves nothing of target_modules={_show(patterns)}"
        )
    in_layers = tuple(n for n in kept if _in_layers(n, config))
    if kept and not in_layers:
        raise TargetError(
            f"layers_to_transform={config.layers_to_transform!r} (layers_pattern={config.layers_pattern!r}) matches no "
            f"layer of the {len(kept)} target modules, such as {kept[0]!r}"
        )
    chosen = tuple(n for n in in_layers if n in set(index.adaptable))
    if not chosen:
        raise TargetError(
            f"target_modules={_show(patterns)} matches only modules that cannot be adapted, such as {in_layers[0]!r}. "
            f"Linear layers of this model end with: {_endings(index.adaptable)}"
        )
    return chosen


def nearest(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The known names that look most like one that was not found."""
    return difflib.get_close_matches(name, sorted(set(known)), n=n, cutoff=0.4)


def _require_each_pattern_to_match(patterns: Sequence[str] | str, index: ModuleIndex) -> None:
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    missing = (
        []
        if patterns == ALL_LINEAR
        else [
            p
            for p in wanted
            if not any(matches_any(n, p if isinstance(patterns, str) else (p,)) for n in index.all_names)
        ]
    )
    if missing or not wanted:
        endings = {n.rpartition(".")[2] for n in index.all_names}
        hints = {p: nearest(p.rpartition(".")[2], endings) for p in missing}
        raise TargetError(
            "; ".join(
                f"target module {p!r} matches no module of the model" + (f" (nearest: {', '.join(h)})" if h else "")
                for p, h in hints.items()
            )
            or "target_modules is empty"
        ) from None


def _in_layers(name: str, config: TargetedConfig) -> bool:
    if config.layers_to_transform is None:
        return True
    wanted = (
        (config.layers_to_transform,) if isinstance(config.layers_to_transform, int) else config.layers_to_transform
    )
    given = config.layers_pattern or (r"[^.]*",)
    patterns = (given,) if isinstance(given, str) else given
    found = (re.match(rf"(?:.*\.)?{pattern}\.(\d+)\.", name) for pattern in patterns)
    return any(match is not None and int(match.group(1)) in wanted for match in found)


def _show(patterns: object) -> str:
    return repr(list(patterns)) if isinstance(patterns, tuple) else repr(patterns)


def _endings(names: Iterable[str]) -> str:
    return ", ".join(sorted({n.rpartition(".")[2] for n in names}))
