"""Reads the folder, files and method of the saved adapter that ``adapter.from`` names, before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.contract.file import WEIGHTS_FILE, read_fields
from veneer.disk.safetensors_header import read_entries
from veneer.errors import ConfigError, FormatError
from veneer.recipe.adapter import FROM, not_that_adapter
from veneer.recipe.known import KnownMethod
from veneer.store.adapter.folder import entries_in


def saved_problems(adapter: Mapping[str, Any], methods: Mapping[str, KnownMethod]) -> list[str]:
    """Return the problems of the saved adapter that ``from`` names; empty if there is no ``from``.

    Settings other than the method are compared when the config is read (`recipe.methods.saved_config`).
    """
    place, method = adapter.get(FROM), str(adapter.get("method"))
    if not isinstance(place, str) or not place:
        return []
    # Here, as it imports the hub's client: most recipes need none.
    from veneer.contract.source import adapter_folder

    try:
        folder: Path = adapter_folder(place)
        saved = str(read_fields(folder).get("peft_type")).lower()
        entries_in(folder, WEIGHTS_FILE, read_entries)
    except (ConfigError, FormatError) as error:
        return [f"adapter.from: {error}"]
    if method in methods and saved in methods and methods[method].home != methods[saved].home:
        return [not_that_adapter([f"adapter.method: {method} here, {saved} in {place}"])]
    return []
