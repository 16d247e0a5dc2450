"""Portable name of a model in a cache, the same on another machine."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from veneer.disk.cache import cache_dir

MANIFEST = "veneer.json"  # beside a model in veneer's cache: where it came from
FETCHED, CONVERTED = "models", "gguf"
_OF_FETCH = re.compile(rf"(?i)veneer/{FETCHED}/([\w.-]+)")
_OF_HUB = re.compile(r"/models--([^/]+)/snapshots/[^/]+")


def known_name(name: str) -> str:
    """Return the portable name of a model if ``name`` is a path into a cache, otherwise ``name`` unchanged.

    The cache may be another machine's. For a model of ``veneer fetch``, the portable name is the name that it was
    fetched by, and for a hub model its id. For a GGUF file, it is the file's own name with its hash,
    ``model.gguf@sha256:0f3a…``.
    """
    if os.path.isdir(name):  # False where `Path.is_dir` raises: in another user's folder, say
        folder = Path(name).resolve()
        if folder.parent == cache_dir().resolve() / FETCHED:
            return folder.name
        if folder.parent == cache_dir().resolve() / CONVERTED and (folder / MANIFEST).is_file():
            return str(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["name"])
    slashed = name.replace("\\", "/").rstrip("/")
    if found := _OF_HUB.search(slashed):
        return found[1].replace("--", "/", 1)
    found = None if os.path.exists(name) else _OF_FETCH.search(slashed)
    return found[1] if found and slashed.endswith(found[0]) else name
