"""The ``adapter`` part of a recipe: a method by its name, and the fields of that method's config as keys.

The names are found, not listed: every method in `veneer.methods` by its ``peft_type`` in small letters, every variant
of LoRA by its file, and the presets of a method (``houlsby``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from veneer.errors import ConfigError, FormatError
from veneer.recipe.advice import belongs, goes_on, meant_method
from veneer.recipe.keys import means_another, missing, perhaps, typed

# Modules that need torch are imported where they are used: a wrong recipe is told before seconds of imports.
if TYPE_CHECKING:
    from veneer.contract import MethodConfig

FULL = "full"
FROM = "from"  # the place of a saved adapter that is trained on
FULL_LEARNING_RATE = 2e-5


@dataclass(frozen=True)
class NamedMethod:
    """A config class, the fields that the name itself sets, and those that it gives where a recipe does not."""

    config: type[MethodConfig]
    switches: Mapping[str, bool] = field(default_factory=dict)
    preset: Mapping[str, Any] = field(default_factory=dict)


def method_of(adapter: Mapping[str, Any]) -> str:
    """The name of the method in an ``adapter`` part."""
    return str(adapter.get("method", "lora"))


def named_methods() -> dict[str, NamedMethod]:
    """Every method by the name that a recipe gives it; a model trained whole (``full``) is not among them."""
    from veneer.methods import all_methods

    found = {name.lower(): NamedMethod(cls) for name, cls in all_methods().items()}
    for cls in all_methods().values():
        found |= {name: NamedMethod(cls, switches={switch: True}) for name, switch in cls.variants().items()}
        found |= {name: NamedMethod(cls, preset=preset) for name, preset in cls.presets().items()}
    return found


def method_names() -> list[str]:
    """All that ``adapter.method`` may be: LoRA first, ``full`` last."""
    return ["lora", *sorted(named_methods().keys() - {"lora"}), FULL]


def name_of(config: MethodConfig) -> str:
    """The method's name as a recipe gives it, such as ``dora``; several variants are told as ``dora + rslora``."""
    on = [name for name, switch in config.variants().items() if getattr(config, switch)]
    return " + ".join(on) or config.peft_type.lower()


def adapter_problems(adapter: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with an ``adapter`` part but the values that the config checks itself."""
    method, names = method_of(adapter), method_names()
    if FROM in adapter:
        return _going_on_problems(adapter)
    if method not in names:
        meant = meant_method(method) or perhaps(method, names)
        return [f"adapter.method: {method!r} must be one of {', '.join(names)}{meant}"]
    rest = _fields(adapter)
    if method == FULL:
        return [f"adapter.{key}: method full trains the whole model and has no settings" for key in rest]
    named, found = named_methods()[method], list[str]()
    given = typed(named.config, rest, found, "adapter.", lambda key: _advice(key, method), ("method", FROM))
    found += missing(named.config, rest, "adapter.")
    return found + [
        f"adapter.{key}: {given[key]!r} contradicts method {method}, which sets it to {value!r}"
        for key, value in named.switches.items()
        if key in given and given[key] != value
    ]


def adapter_config(adapter: Mapping[str, Any]) -> MethodConfig | None:
    """The config that a part without problems means; None where the whole model is trained.

    LoRA and its variants act on every linear layer where the part does not say otherwise. Raises ConfigError for
    settings that the config refuses, and for those that no recipe carries out.
    """
    if FROM in adapter:
        return saved_config(adapter)
    if method_of(adapter) == FULL:
        return None
    named = named_methods()[method_of(adapter)]
    given = typed(named.config, _fields(adapter), [])
    config = named.config(**{**named.config.usual_fields, **named.preset, **given, **named.switches})
    start = config.late_start
    if start is not None and start.settings is not None:
        raise ConfigError(
            f"adapter: {config.peft_type} with {type(start.settings).__name__} starts from a pass over data, which no "
            "recipe makes: take another start, or call initialize_lora_eva_weights in Python"
        )
    return config


def usual_learning_rate(adapter: Mapping[str, Any]) -> float:
    """The learning rate where a recipe gives none."""
    method = method_of(adapter)
    if FROM in adapter:
        return saved_config(adapter).usual_learning_rate
    return FULL_LEARNING_RATE if method == FULL else named_methods()[method].config.usual_learning_rate


def saved_config(adapter: Mapping[str, Any]) -> MethodConfig:
    """The config of the saved adapter that ``from`` names, with the settings of training (dropout) that the part gives.

    Raises ConfigError for files that cannot be read, and, with both values, for a method or a setting that is another
    in the part than in the files.
    """
    from veneer.contract.source import HubOptions, adapter_folder
    from veneer.store.adapter.config import read_config

    place = str(adapter[FROM])
    try:
        config = read_config(adapter_folder(place, HubOptions()))
    except (ConfigError, FormatError) as error:
        raise ConfigError(f"adapter.from: {error}") from error
    problems = list[str]()
    method = adapter.get("method")
    if method is not None and not _is_method(config, str(method)):
        problems.append(f"adapter.method: {method} here, {name_of(config)} in {place}")
        raise ConfigError(not_that_adapter(problems))
    rest = {key: value for key, value in _fields(adapter).items() if key != FROM}
    if means_all_linear(adapter) and hasattr(config, "target_modules"):  # compared with names where the model is known
        rest.pop("target_modules")
    given = typed(type(config), rest, problems, "adapter.", beside=("method", FROM))
    for key, value in given.items():
        saved = getattr(config, key)
        if "dropout" not in key and _plain(value) != _plain(saved):
            problems.append(f"adapter.{key}: {adapter[key]!r} here, {_plain(saved)!r} in {place}")
    if problems:
        raise ConfigError(not_that_adapter(problems))
    return replace(config, **{key: value for key, value in given.items() if "dropout" in key})


def means_all_linear(adapter: Mapping[str, Any]) -> bool:
    """True for a part whose target modules are all linear layers."""
    return str(adapter.get("target_modules")).lower() == "all-linear"


def _is_method(config: MethodConfig, method: str) -> bool:
    named = named_methods().get(method)
    return (
        named is not None
        and type(config) is named.config
        and (not config.variants() or method in (name_of(config), config.peft_type.lower()))
    )


def _going_on_problems(adapter: Mapping[str, Any]) -> list[str]:
    place, method = adapter[FROM], adapter.get("method")
    if not isinstance(place, str) or not place:
        return [f"adapter.from: {place!r} must be the folder of a saved adapter, or a hub id"]
    if method is not None and method not in method_names():
        return [
            f"adapter.method: {method!r} must be one of {', '.join(method_names())}{perhaps(method, method_names())}"
        ]
    return []


def not_that_adapter(problems: list[str]) -> str:
    """The message about settings in which an ``adapter`` part differs from the saved adapter that it names."""
    return (
        "; ".join(problems)
        + ". An adapter that is trained on stays the adapter that it is: leave these keys out, or leave adapter.from "
        "out and begin a new one. Data, task, rates and dropout may differ"
    )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, list | tuple | set | frozenset) else value


def _advice(key: str, method: str) -> str:
    if goes_on(key):
        return "; to train a saved adapter on, say adapter.from"
    known = [f.name for f in fields(named_methods()[method].config)]
    return belongs(key, "adapter") or ("" if means_another(key, known) else _of_others(key, method))


def _of_others(key: str, method: str) -> str:
    """The end of a message about a setting that other methods have."""
    from veneer.methods import all_methods

    owners = sorted(name.lower() for name, cls in all_methods().items() if key in (f.name for f in fields(cls)))
    return f"; method {method} has no such setting, it is one of {', '.join(owners)}: leave it out" if owners else ""


def _fields(adapter: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in adapter.items() if key != "method"}
