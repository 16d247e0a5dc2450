"""Part ``adapter`` of a recipe: a method by its name, and the fields of that method's config as keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from veneer.recipe.advice import belongs, goes_on, meant_method
from veneer.recipe.key_checks import means_another, missing, perhaps, typed
from veneer.recipe.known import KnownMethod
from veneer.recipe.ranges import OF_LORA, out_of_range

FULL = "full"
FROM = "from"  # the place of a saved adapter that is trained on
EXPERTS = "experts"  # true: the stacks of experts are adapted too
_ALL_EXPERTS = "all-experts"
_LORA = ("lora", "rslora", "dora", "lora_bias")


def method_of(adapter: Mapping[str, Any]) -> str:
    """Return the name of the method in an ``adapter`` part."""
    return str(adapter.get("method", "lora"))


def names_of(methods: Mapping[str, KnownMethod]) -> list[str]:
    """Return all values of ``adapter.method``: LoRA first, ``full`` last."""
    return ["lora", *sorted(methods.keys() - {"lora"}), FULL]


def adapter_problems(adapter: Mapping[str, Any], methods: Mapping[str, KnownMethod]) -> list[str]:
    """Return the problems of an ``adapter`` part, except those of values that the config checks itself."""
    method, names = method_of(adapter), names_of(methods)
    if FROM in adapter:
        return _going_on_problems(adapter, names)
    if method not in names:
        meant = meant_method(method) or perhaps(method, names)
        return [f"adapter.method: {method!r} must be one of {', '.join(names)}{meant}"]
    rest = fields_of(adapter)
    if method == FULL:
        return [f"adapter.{key}: method full trains the whole model and has no settings" for key in rest]
    named, found = methods[method], _problems_of_experts(adapter)
    given = typed(named.keys, rest, found, "adapter.", lambda key: _advice(key, method, methods), ("method", FROM))
    found += missing(named.keys, rest, "adapter.")
    ranges = OF_LORA if method in _LORA else {}
    found += [
        f"adapter.{key}: {given[key]!r} must be {allowed}" for key, allowed in out_of_range(given, ranges).items()
    ]
    return found + [
        f"adapter.{key}: {given[key]!r} contradicts method {method}, which sets it to {value!r}"
        for key, value in named.switches.items()
        if key in given and given[key] != value
    ]


def differs_in_writing(adapter: Mapping[str, Any], saved: Any) -> bool:
    """Return True if a part's target modules are written otherwise than the ``saved`` ones, so that only a model can
    show if they are the same modules.

    This is so if at least one of the two is a pattern, or ``all-linear``.
    """
    given = adapter.get("target_modules")
    names = isinstance(given, list | tuple)
    return given != saved and (isinstance(given, str) or (names and isinstance(saved, str)))


def not_that_adapter(problems: list[str]) -> str:
    """Return the message for an ``adapter`` part whose settings differ from the saved adapter that it names."""
    return (
        "; ".join(problems)
        + ". An adapter that is trained on stays the adapter that it is: leave these keys out, or leave adapter.from "
        "out and begin a new one. Data, task, rates and dropout may differ"
    )


def _going_on_problems(adapter: Mapping[str, Any], names: list[str]) -> list[str]:
    place, method = adapter[FROM], adapter.get("method")
    if not isinstance(place, str) or not place:
        return [f"adapter.from: {place!r} must be the folder of a saved adapter, or a hub id"]
    if method is not None and method not in names:
        return [f"adapter.method: {method!r} must be one of {', '.join(names)}{perhaps(method, names)}"]
    return []


def _advice(key: str, method: str, methods: Mapping[str, KnownMethod]) -> str:
    if goes_on(key):
        return "; to train a saved adapter on, say adapter.from"
    others = "" if means_another(key, methods[method].keys.types) else _of_others(key, method, methods)
    return belongs(key, "adapter") or others


def _of_others(key: str, method: str, methods: Mapping[str, KnownMethod]) -> str:
    """Return the end of a message about a setting that only other methods have."""
    owners = sorted(name for name, each in methods.items() if each.is_own and key in each.keys.types)
    return f"; method {method} has no such setting (it belongs to {', '.join(owners)}): leave it out" if owners else ""


def _problems_of_experts(adapter: Mapping[str, Any]) -> list[str]:
    given = adapter.get(EXPERTS)
    if given is None or isinstance(given, bool):
        return []
    return [f"adapter.experts: {given!r} must be true (stacks of experts are adapted too) or false"]


def fields_of(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Return those fields of a config that an ``adapter`` part sets."""
    fields = {key: value for key, value in adapter.items() if key not in ("method", EXPERTS)}
    if adapter.get(EXPERTS) is True:
        fields["target_parameters"] = [*(fields.get("target_parameters") or ()), _ALL_EXPERTS]
    return fields
