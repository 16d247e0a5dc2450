"""Keys that ``adapter`` and ``training`` may hold: fields of the classes of methods and trainers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from veneer.recipe.declared_in_source import classes_with, declared_keys, file_of, literal
from veneer.recipe.key_checks import AllowedKeys
from veneer.recipe.tasks import Task, home_of_settings

_METHODS = "veneer.methods"
_VARIANTS = f"{_METHODS}.variants"


@dataclass(frozen=True)
class KnownMethod:
    """A method's name in a recipe and the keys of its config, which ``read`` returns.

    ``switches``: the keys that the name itself sets. ``home``: the module and name of the config. ``is_own``: the name
    is that of the config, instead of a variant or preset.
    """

    home: tuple[str, str]
    read: Callable[[], AllowedKeys]
    switches: Mapping[str, bool] = field(default_factory=dict)
    is_own: bool = True

    @property
    def keys(self) -> AllowedKeys:
        """The keys of the config. They are read from source only when asked for, because a recipe needs one of some
        sixty methods.
        """
        return self.read()


@dataclass(frozen=True)
class KnownKeys:
    """Keys of each method by its name, and of each task's trainer."""

    methods: Mapping[str, KnownMethod]
    settings: Callable[[Task], AllowedKeys]


def declared() -> KnownKeys:
    """Return the keys of all methods and trainers, read from source: torch and transformers are not imported.

    Raises UnreadableError if the source of a package is not installed.
    """
    return KnownKeys(declared_methods(), lambda task: declared_keys(*home_of_settings(task)))


@functools.cache
def declared_methods() -> Mapping[str, KnownMethod]:
    """Return the keys of the methods, variants and presets in `veneer.methods`, read from source."""
    found, presets = dict[str, KnownMethod](), dict[str, KnownMethod]()
    for module in method_modules():
        for name, peft_type in classes_with(module, "peft_type"):
            method = KnownMethod((module, name), functools.partial(declared_keys, module, name))
            found[peft_type.lower()] = method
            presets |= dict.fromkeys(literal(module, "PRESETS", {}), replace(method, is_own=False))
    variants = {}
    for name, switch in variant_switches().items():
        for method in found.values():
            if method.keys.types.get(switch) is bool:  # others are turned on by settings
                variants[name] = replace(method, switches={switch: True}, is_own=False)
    return found | variants | presets


@functools.cache
def variant_switches() -> Mapping[str, str]:
    """Return the field that turns on each variant of LoRA, by the variant's name."""
    return {module.rpartition(".")[2]: next(classes_with(module, "switch"))[1] for module in _modules(_VARIANTS)}


def method_modules() -> Iterator[str]:
    """Return the modules in `veneer.methods`, found without importing one."""
    return _modules(_METHODS)


def _modules(package: str) -> Iterator[str]:
    files = sorted(file_of(package).parent.glob("*.py"))
    return (f"{package}.{path.stem}" for path in files if path.stem != "__init__")
