"""Folders of adapters as a user names them, looked for before torch is imported."""

from __future__ import annotations

from pathlib import Path

from veneer.errors import ConfigError


def require_adapter(adapter: Path | None) -> None:
    """Raise ConfigError for an adapter whose folder does not exist. None is no adapter, and allowed."""
    if adapter is not None and not adapter.is_dir():
        raise ConfigError(
            f"no adapter {str(adapter)!r}: there is no such folder. Give one that holds adapter_config.json"
        )
