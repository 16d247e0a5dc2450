"""``adapter_config.json``: PEFT's fields, written and read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from veneer.core.method import MethodConfig
from veneer.core.targets import nearest
from veneer.disk.atomic import write_atomically
from veneer.errors import ConfigError, FormatError
from veneer.methods import all_methods
from veneer.store.adapter_source import adapter_folder, hub_options

CONFIG_FILE = "adapter_config.json"
PEFT_VERSION = "0.21.2"

# Fields of PEFT that no method here has, with the value that means "not used". One that is neutral is written and
# accepted; any other value asks for something that is not supported.
_COMMON: dict[str, Any] = {"auto_mapping": None}
_NEUTRAL: dict[str, dict[str, Any]] = {
    "LORA": {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "corda_config": None,
        "kasa_config": None,
        "layer_replication": None,
        "loftq_config": {},
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "monteclora_config": None,
        "qalora_group_size": 16,
        "use_bdlora": None,
        "use_qalora": False,
        "velora_config": None,
    }
}
# Fields that PEFT's config of the method does not have: written only where they say something.
_EXTRA = {"IA3": ("layers_pattern", "layers_to_transform")}
_NEUTRAL["ADALORA"] = _NEUTRAL["LORA"] | {
    "alpha_pattern": {},
    "ensure_weight_tying": False,
    "eva_config": None,
    "lora_bias": False,
    "r": 8,  # written beside init_r and target_r, and read by nobody
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_dora": False,
    "use_rslora": False,
}
# Values that change nothing on reading, whatever they are.
_INFORMATIVE = ("auto_mapping", "peft_version", "megatron_core", "qalora_group_size", "runtime_config")
_UNREAD = {"ADALORA": ("r",)}  # the same, for one method


def to_json(config: MethodConfig, auto_mapping: Mapping[str, str] | None = None) -> str:
    """The text of ``adapter_config.json``: keys sorted, indented by 2, as PEFT writes it."""
    values: dict[str, Any] = dict(_NEUTRAL.get(config.peft_type, {}))
    on_disk = [spec.name for spec in fields(config) if spec.metadata.get("on_disk", True)]
    values |= {name: _plain(getattr(config, name)) for name in on_disk}
    for extra in _EXTRA.get(config.peft_type, ()):
        if values[extra] is None:
            del values[extra]
    values |= {"auto_mapping": auto_mapping if config.task_type is None else None}
    values |= {"peft_type": config.peft_type, "peft_version": PEFT_VERSION}
    return json.dumps(values, indent=2, sort_keys=True)


def save_config(config: MethodConfig, folder: str | os.PathLike[str]) -> None:
    """Write ``adapter_config.json`` alone. Raises DiskError."""
    write_atomically(Path(folder) / CONFIG_FILE, to_json(config).encode())


def for_use(config: MethodConfig) -> MethodConfig:
    """The config as it is written beside trained values: in the form that others know, and for inference."""
    return replace(config.packed(), inference_mode=True)


def config_of(model_id: str | os.PathLike[str], hub: Mapping[str, Any]) -> MethodConfig:
    """The config of a saved adapter, from a folder or a hub id; ``hub`` holds the fields of `HubOptions`."""
    return read_config(adapter_folder(model_id, hub_options(hub)))


def read_config(folder: Path) -> MethodConfig:
    """The config of an adapter folder. Raises FormatError where there is none or it is not understood."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        inside = folder / "adapter"  # where a training run saves it
        advice = f"; {inside} holds one, give that folder" if (inside / CONFIG_FILE).is_file() else ""
        raise FormatError(f"{folder} holds no {CONFIG_FILE}: it is not the folder of an adapter{advice}")
    try:
        return from_json(path.read_text(encoding="utf-8"), path)
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not text in UTF-8: {error}") from error


def from_json(text: str, source: Path) -> MethodConfig:
    """The config that an ``adapter_config.json`` holds.

    Raises FormatError with everything that is wrong: damaged JSON, an unknown method, unknown keys (naming the nearest
    known one), and features that are not supported.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise FormatError(f"{source} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise FormatError(f"{source} is nested too deeply to be read: it is damaged, or no config") from error
    if not isinstance(values, dict):
        raise FormatError(f"{source} must hold a JSON object, it holds a {type(values).__name__}")
    return from_values(values, str(source))


def from_values(given: Mapping[str, Any], source: str) -> MethodConfig:
    """The config that these fields mean, ``peft_type`` among them. Raises FormatError with everything that is wrong."""
    values = dict(given)
    method = _method(values.pop("peft_type", None), source)
    known = {spec.name for spec in fields(method)}
    neutral = _COMMON | _NEUTRAL.get(method.peft_type, {})
    unread = (*_INFORMATIVE, *_UNREAD.get(method.peft_type, ()))
    problems = [
        _problem(key, value, known, neutral)
        for key, value in values.items()
        if key not in known and key not in unread and not (key in neutral and _is_neutral(value, neutral[key]))
    ]
    if problems:
        raise FormatError(f"{source}: " + "; ".join(problems))
    try:
        return method.from_dict({key: value for key, value in values.items() if key in known})
    except (ConfigError, TypeError, AttributeError) as error:  # a value of a type that the checks cannot even compare
        raise FormatError(f"{source}: {error}") from error


def _method(peft_type: object, source: str) -> type[MethodConfig]:
    methods = all_methods()
    if not isinstance(peft_type, str) or peft_type not in methods:
        raise FormatError(f"{source}: peft_type={peft_type!r} is not a method here; there are {sorted(methods)}")
    return methods[peft_type]


def _problem(key: str, value: object, known: set[str], neutral: Mapping[str, object]) -> str:
    if key in neutral:
        return f"{key}={value!r} asks for a feature of PEFT that is not supported here (allowed: {neutral[key]!r})"
    close = nearest(key, known | set(neutral), n=1)
    return f"unknown key {key!r}" + (f" (nearest: {close[0]!r})" if close else "")


def _is_neutral(value: object, neutral: object) -> bool:
    return value == neutral or (not value and not neutral)


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value
