"""Record of the adapters that `veneer merge` merged into a folder, by weight digest: none is merged twice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from veneer.contract.file import WEIGHTS_FILE
from veneer.errors import CompositionError, FormatError

FILE = "merged_adapters.json"


def require_not_merged(base: Path | str, adapter: Path) -> None:
    """Raise CompositionError if a base's record lists an adapter with these weights. A base on the hub is not checked.

    Raises FormatError as `merged_adapters` does, and if the adapter's weights cannot be read.
    """
    merged = merged_adapters(base) if isinstance(base, Path) else []
    digest = _digest(adapter) if merged else None
    held = [entry["adapter"] for entry in merged if entry["blake2b"] == digest]
    if held:
        raise CompositionError(
            f"{base} has {adapter} in it already (as {held[0]}, in its {FILE}), and a second merge would double its "
            "change. Use the base that the adapter was trained on. To double the change on purpose, give the adapter "
            "weight 2 (`veneer combine`)"
        )


def write_record(base: Path, adapter: Path, into: Path) -> None:
    """Write a base's record, with this adapter added, into a folder."""
    entries = [*merged_adapters(base), {"adapter": "/".join(adapter.resolve().parts[-2:]), "blake2b": _digest(adapter)}]
    (into / FILE).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def merged_adapters(folder: Path) -> list[dict[str, Any]]:
    """Return the adapters merged into a model's folder. Raises FormatError if its record cannot be read."""
    file = folder / FILE
    if not file.exists():
        return []
    try:
        return [
            {"adapter": str(entry["adapter"]), "blake2b": str(entry["blake2b"])}
            for entry in json.loads(file.read_bytes())
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"{file} is no list of merged adapters: restore it, or remove it if nothing is merged"
        ) from error


def _digest(adapter: Path) -> str:
    path = adapter / WEIGHTS_FILE
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error.strerror}): give a file that this user may read") from error
