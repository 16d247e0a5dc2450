"""Reads the config of an adapter folder without torch, from the field declarations in the source of its method.

Most adapters hold plain values: positive numbers, switches, lists of names. If a config has any other value, only the
method's class checks it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from veneer.contract import peft_fields
from veneer.contract.file import problems_of, read_fields
from veneer.contract.keys import divided
from veneer.disk.known_name import known_name
from veneer.plain.module_names import matches_any
from veneer.plain.tasks import TaskType
from veneer.recipe.declared_in_source import (
    UNCLEAR,
    UnreadableError,
    class_value,
    classes_with,
    declared_defaults,
    declared_keys,
    file_of,
)
from veneer.recipe.known import method_modules, variant_switches

_ASIDE = frozenset({"base_model_name_or_path", "revision", "inference_mode"})
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save|original_module|token_adapter|ln_tuning_layers)\.|_delta$")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredConfig:
    """Config of an adapter: all ``values`` by field, in the order of its class, and the settings shown to people."""

    method: str
    values: Mapping[str, Any]
    told: Mapping[str, Any]
    base: str | None


def declared_config(folder: Path) -> DeclaredConfig | None:
    """Return the config of an adapter folder, or None if only the class of its method can check it.

    Raises FormatError if there is no config or it is not a JSON object.
    """
    given = read_fields(folder)
    peft_type = given.pop("peft_type", None)
    with suppress(UnreadableError):
        for module in method_modules():
            if f'"{peft_type}"' in file_of(module).read_text(encoding="utf-8"):
                for name, own in classes_with(module, "peft_type"):
                    if own == peft_type:
                        return _config(module, name, own, given)
    return None


def _config(module: str, name: str, peft_type: str, given: Mapping[str, Any]) -> DeclaredConfig | None:
    """Return an adapter's config, read by its class's declarations in source. Return None if only the imported class
    could check a value.

    Raises UnreadableError if the class defines its own way to show settings.
    """
    class_value(module, name, "told")
    defaults = declared_defaults(module, name)
    if problems_of(given, defaults, _peft_fields(module, name)):
        return None
    own = {key: value for key, value in given.items() if key in defaults}
    chosen = {key: value for key, value in own.items() if value != defaults[key]}
    if any(default is MISSING and key not in own for key, default in defaults.items()):
        return None
    types = declared_keys(module, name).types
    if any(not _is_plain(key, value, defaults[key], types[key]) for key, value in chosen.items()):
        return None
    values = {key: own.get(key, None if default is UNCLEAR else default) for key, default in defaults.items()}
    headline = _headline(module, name)
    shown = (*headline, *(key for key in defaults if key in chosen and key not in _ASIDE and key not in headline))
    base = values["base_model_name_or_path"]
    switches = {short: switch for short, switch in variant_switches().items() if values.get(switch) is True}
    return DeclaredConfig(
        method=" + ".join(switches) or peft_type.lower(),
        values={**values, "base_model_name_or_path": None if base is None else known_name(base)},
        told={key: values[key] for key in shown if values[key] is not None},
        base=None if base is None else known_name(base),
    )


def modules_named(config: DeclaredConfig, keys: Iterable[str]) -> tuple[str, ...] | None:
    """Return the paths of the modules that tensors with these keys change, or None if the names do not
    determine them.
    """
    names = config.values.get("target_modules")
    if not isinstance(names, list):
        names = [] if names is None and "target_modules" not in config.values else None
    found = set()
    for key in keys:
        prefix, rest = divided(key)
        if not prefix.endswith("model.model.") and "." not in rest:
            continue  # virtual tokens, or a tensor that all layers share
        parts = rest.split(".")
        path = names and next((p for p in _paths(parts) if matches_any(p, names)), None)
        if not path or _WRAPPED.search(key):
            return None
        found.add(path)
    return tuple(sorted(found))


def _paths(parts: list[str]) -> Iterable[str]:
    """Return every proper prefix of a dotted path, given as its parts, the longest first: ``a.b`` and ``a`` for
    ``a.b.c``.
    """
    return (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))


def _is_plain(key: str, value: Any, default: Any, kind: Any) -> bool:
    """Return True if every method accepts ``value`` for a field of type ``kind`` with this default."""
    other = isinstance(value, bool) != isinstance(default, bool) or isinstance(default, str) > isinstance(value, str)
    if default is UNCLEAR or other:
        return False
    if key in ("base_model_name_or_path", "revision"):
        return isinstance(value, str)
    if key == "task_type":
        return value in [task.value for task in TaskType]
    if isinstance(value, list):
        return (bool(value) or key != "target_modules") and all(isinstance(each, str) for each in value)
    if isinstance(value, float):
        return 0 < value < 1 or (kind is float and value > 0 and value.is_integer())
    return value is None or isinstance(value, bool) or (isinstance(value, int) and value > 0)


def _headline(module: str, name: str) -> tuple[str, ...]:
    value = class_value(module, name, "headline")
    return () if value is None else tuple(ast.literal_eval(value))


def _peft_fields(module: str, name: str) -> peft_fields.PeftFields:
    """Return the class's table of PEFT's fields. Raises UnreadableError if its source computes the table."""
    value = class_value(module, name, "peft_fields")
    try:
        code = compile(ast.Expression(value or ast.Name("COMMON", ast.Load(), lineno=0, col_offset=0)), module, "eval")
        found: peft_fields.PeftFields = eval(code, {"__builtins__": {}}, dict(vars(peft_fields)))
    except NameError as error:
        raise UnreadableError(f"{module}.{name}.peft_fields") from error
    return found
