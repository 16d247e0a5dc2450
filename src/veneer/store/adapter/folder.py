"""Folders of adapters as a user names them, looked for before torch is imported."""

from __future__ import annotations

from pathlib import Path

from veneer.disk.near import near_paths
from veneer.errors import ConfigError

NEEDS_BASE = frozenset(
    {"ADAMSS", "BOFT", "DEFT", "FROD", "HIRA", "HRA", "IA3", "OFT", "OSF", "PEANUT", "PSOFT", "ROAD"}
)
"""Names (``peft_type``) of the methods whose updates always depend on the weights of the base."""


def require_adapter(adapter: Path | None) -> None:
    """Raise ConfigError for an adapter whose folder does not exist. None is no adapter, and allowed."""
    if adapter is not None and not adapter.is_dir():
        near = near_paths(adapter, folders=True)
        meant = (
            f"; did you mean {' or '.join(map(repr, near))}?" if near else ". Give one that holds adapter_config.json"
        )
        raise ConfigError(f"no adapter {str(adapter)!r}: there is no such folder{meant}")


def needs_base(adapter: Path) -> str:
    """Return the message that an adapter has no update without its base."""
    return f"the adapter {adapter} scales or reads the weights of its base: give the base too (--base MODEL)"
