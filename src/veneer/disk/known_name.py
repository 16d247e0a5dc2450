"""Name of a model that lies in a cache: one that means the same on another machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

from veneer.disk.cache import cache_dir

MANIFEST = "veneer.json"  # beside a model in veneer's cache: where it came from
FETCHED, CONVERTED = "models", "gguf"
_OF_FETCH = re.compile(rf"(?i)veneer/{FETCHED}/([\w.-]+)")
_OF_HUB = re.compile(r"/models--([^/]+)/snapshots/[^/]+")


def known_name(name: str) -> str:
    """Return the name of a model by which other machines know it, where ``name`` is a path into a cache, of this
    machine or of another; otherwise ``name`` as it is.

    A model of ``veneer fetch`` goes by the name that it was fetched by, one of the hub by its id, and a GGUF file by
    its own name and hash, ``model.gguf@sha256:0f3a…``.
    """
    path = Path(name)
    if path.is_dir():
        folder = path.resolve()
        if folder.parent == cache_dir().resolve() / FETCHED:
            return folder.name
        if folder.parent == cache_dir().resolve() / CONVERTED and (folder / MANIFEST).is_file():
            return str(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["name"])
    slashed = name.replace("\\", "/").rstrip("/")
    if found := _OF_HUB.search(slashed):
        return found[1].replace("--", "/", 1)
    found = None if path.exists() else _OF_FETCH.search(slashed)
    return found[1] if found and slashed.endswith(found[0]) else name
