"""Checks target modules against the file headers of a local base. No weight is read, and torch is not imported."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.disk.safetensors_header import read_table
from veneer.errors import FormatError
from veneer.plain.module_names import matches_any, nearest_modules
from veneer.recipe.adapter import FULL, method_of
from veneer.recipe.declared_in_source import file_of
from veneer.recipe.known import declared_methods
from veneer.recipe.values import section
from veneer.store.found import folder_here

_INDEX, _FILE = "model.safetensors.index.json", "model.safetensors"
_MADE = re.compile(r"head|embed|score|classifier")  # may be tied or new, and so in no file


def target_problems(values: Mapping[str, Any]) -> list[str]:
    """Return the problems of names in ``adapter.target_modules`` that match no module of the base.

    The result is empty if the base is not local, if transformers renames its tensors when it loads them, or if the
    method has no ``target_modules``. Raises UnreadableError if the source of veneer or transformers is not installed.
    """
    if not _reads_targets(values):
        return []
    targets, source = section(values, "adapter").get("target_modules"), section(values, "model").get("source")
    folder = folder_here(source) if isinstance(source, str) else None
    names = () if folder is None else module_names(folder)
    listed = targets if isinstance(targets, list) else []
    meant = [target for target in listed if isinstance(target, str) and not _MADE.search(target)]
    absent = [target for target in meant if names and not _found(target, names)]
    return [
        f"adapter.target_modules: {target!r} matches no module of {source}; the nearest: "
        f"{', '.join(nearest_modules(target, names)) or 'none'}"
        for target in absent
    ]


def module_names(folder: Path) -> tuple[str, ...]:
    """Return the paths of the modules that hold tensors, as the headers of a model's files name them.

    The result is empty if the files cannot be read, or if transformers renames the tensors of this model type on
    loading.
    """
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        renamed = f'"{model_type}"' in file_of("transformers.conversion_mapping").read_text(encoding="utf-8")
        index = folder / _INDEX
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else None
        names = read_table(folder / _FILE)[0] if table is None else table
    except (OSError, ValueError, LookupError, TypeError, FormatError):  # told when the model is loaded
        return ()
    return () if renamed else tuple(dict.fromkeys(name.rpartition(".")[0] for name in names if "." in name))


def _found(target: str, names: tuple[str, ...]) -> bool:
    # A base may be saved without the prefix that its head's class puts before its names.
    return any(matches_any(name, (target,)) or target.endswith(f".{name}") for name in names)


def _reads_targets(values: Mapping[str, Any]) -> bool:
    """Return True if the recipe's method has the setting ``target_modules``, or is unknown. Return False for full
    fine-tuning.
    """
    method = method_of(section(values, "adapter"))
    known = declared_methods()
    return method != FULL and (method not in known or "target_modules" in known[method].keys.types)
