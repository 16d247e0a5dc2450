"""Cache folder for fetched and converted models."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_dir() -> Path:
    """Return ``$VENEER_CACHE``, or the folder ``veneer`` in the platform's cache folder."""
    override = os.environ.get("VENEER_CACHE")
    if override:
        return Path(override).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "veneer"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "veneer"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "veneer"
