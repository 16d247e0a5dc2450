"""Methods that a recipe may name, and the config of its ``adapter`` part.

The names are found, not listed. Every method in `veneer.methods` goes by its ``peft_type`` in small letters, every
variant of LoRA by its file. Presets of a method (``houlsby``) are names too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from veneer.contract import MethodConfig
from veneer.contract.source import HubOptions, adapter_folder
from veneer.errors import ConfigError, FormatError
from veneer.methods import all_methods
from veneer.recipe.adapter import FROM, FULL, differs_in_writing, fields_of, method_of, not_that_adapter
from veneer.recipe.key_checks import keys_of, typed
from veneer.recipe.known import KnownKeys, KnownMethod
from veneer.recipe.tasks import settings_of
from veneer.store.adapter.config import read_config

FULL_LEARNING_RATE = 2e-5


@dataclass(frozen=True)
class NamedMethod:
    """Method by its name in a recipe: its config class, the fields that the name sets, and defaults for
    other fields.
    """

    config: type[MethodConfig]
    switches: Mapping[str, bool] = field(default_factory=dict)
    preset: Mapping[str, Any] = field(default_factory=dict)


def named_methods() -> dict[str, NamedMethod]:
    """Return every method by its name in a recipe, except ``full``, which trains the whole model."""
    found = {name.lower(): NamedMethod(cls) for name, cls in all_methods().items()}
    for cls in all_methods().values():
        found |= {name: NamedMethod(cls, switches={switch: True}) for name, switch in cls.variants().items()}
        found |= {name: NamedMethod(cls, preset=preset) for name, preset in cls.presets().items()}
    return found


def imported() -> KnownKeys:
    """Return the keys of all methods and trainers, as their imported classes have them."""
    methods = {
        name: KnownMethod(
            (each.config.__module__, each.config.__name__),
            partial(keys_of, each.config),
            each.switches,
            is_own=name == each.config.peft_type.lower(),
        )
        for name, each in named_methods().items()
    }
    return KnownKeys(methods, lambda task: keys_of(settings_of(task)))


def name_of(config: MethodConfig) -> str:
    """Return the method's name in a recipe, such as ``dora``; several variants give ``dora + rslora``."""
    on = [name for name, switch in config.variants().items() if getattr(config, switch)]
    return " + ".join(on) or config.peft_type.lower()


def adapter_config(adapter: Mapping[str, Any]) -> MethodConfig | None:
    """Return the config of an ``adapter`` part without problems, or None if the whole model is trained.

    LoRA and its variants change every linear layer unless the part names others. Raises ConfigError for settings that
    the config refuses, and for those that no recipe supports.
    """
    if FROM in adapter:
        return saved_config(adapter)
    if method_of(adapter) == FULL:
        return None
    named = named_methods()[method_of(adapter)]
    given = typed(keys_of(named.config), fields_of(adapter), [])
    config = named.config(**{**named.config.usual_fields, **named.preset, **given, **named.switches})
    start = config.late_start
    if start is not None and start.settings is not None:
        raise ConfigError(
            f"adapter: {config.peft_type} with {type(start.settings).__name__} starts from a pass over data, which no "
            "recipe makes: take another start, or make that pass in Python (docs/methods.md)"
        )
    return config


def usual_learning_rate(adapter: Mapping[str, Any]) -> float:
    """Return the learning rate of a recipe that does not set one."""
    method = method_of(adapter)
    if FROM in adapter:
        return saved_config(adapter).usual_learning_rate
    return FULL_LEARNING_RATE if method == FULL else named_methods()[method].config.usual_learning_rate


def saved_config(adapter: Mapping[str, Any]) -> MethodConfig:
    """Return the config of the saved adapter that ``from`` names, with the part's training settings, such as dropout.

    Raises ConfigError for files that cannot be read. Raises it, with both values, if the method or a setting of the
    part differs from the files.
    """
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
    rest = {key: value for key, value in fields_of(adapter).items() if key != FROM}
    if hasattr(config, "target_modules") and differs_in_writing(adapter, config.target_modules):  # compared in a run
        rest.pop("target_modules")
    given = typed(keys_of(type(config)), rest, problems, "adapter.", beside=("method", FROM))
    for key, value in given.items():
        saved = getattr(config, key)
        if "dropout" not in key and _plain(value) != _plain(saved):
            problems.append(f"adapter.{key}: {adapter.get(key, value)!r} here, {_plain(saved)!r} in {place}")
    if problems:
        raise ConfigError(not_that_adapter(problems))
    return replace(config, **{key: value for key, value in given.items() if "dropout" in key})


def _is_method(config: MethodConfig, method: str) -> bool:
    named = named_methods().get(method)
    return (
        named is not None
        and type(config) is named.config
        and (not config.variants() or method in (name_of(config), config.peft_type.lower()))
    )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, list | tuple | set | frozenset) else value
