"""Models by portable name, the same on every machine: models known to `veneer fetch`, and GGUF files by hash."""

from __future__ import annotations

import json
import re
from pathlib import Path

from veneer.disk.cache import cache_dir
from veneer.disk.digest import sha256_of
from veneer.disk.known_name import CONVERTED, MANIFEST, known_name
from veneer.errors import ConfigError
from veneer.store.gguf.blocks import described_file, is_at_hand
from veneer.store.gguf.model import CONVERSION, folder_of_file
from veneer.store.known import KNOWN, is_fetched, model_folder

_GGUF_NAME = re.compile(r"([^/\\]+\.gguf)@sha256:([0-9a-f]{64})")


def is_portable(name: str) -> bool:
    """Return True if a name is not a hub id, and names the same model on every machine that has veneer."""
    return name in KNOWN or _GGUF_NAME.fullmatch(name) is not None


def folder_of(name: str) -> Path | None:
    """Return the local folder of a model by its portable name; None for other names.

    A GGUF file is searched for among those that the cache describes, then among dense copies, then in the current
    folder. Raises ConfigError, with instructions to get it, if the model is not on this machine.
    """
    name = known_name(name)
    if name in KNOWN:
        if not is_fetched(name):
            raise ConfigError(f"the model {name!r} is not in the cache yet: run `veneer fetch {name}`")
        return model_folder(name)
    meant = _GGUF_NAME.fullmatch(name)
    if meant is None:
        return None
    file, digest = meant.groups()
    cached = [manifest.parent for manifest in sorted((cache_dir() / CONVERTED).glob(f"*/{MANIFEST}"))]
    held = [folder for folder in cached if _holds(folder, digest) and is_at_hand(folder)]
    if held:
        return min(held, key=lambda folder: described_file(folder) is None)
    here = Path(file)
    if here.is_file() and sha256_of(here) == digest:
        return folder_of_file(here)
    raise ConfigError(
        f"the model is the GGUF file {file} with the SHA-256 {digest}, not yet read on this machine"
        f"{f' (the {file} in this folder has another hash)' if here.is_file() else ''}: put that file into this "
        "folder, or give its path as the model. After the first use it is found by its hash"
    )


def _holds(folder: Path, digest: str) -> bool:
    """Return True if a cached folder was converted from the file with this hash, by the current conversion."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return bool(manifest["name"].endswith(digest) and manifest["conversion"] == CONVERSION)


def file_of(name: str) -> Path | None:
    """Return the GGUF file that a model's name means, if the model's weights are read from it in place; else None."""
    path = Path(name).expanduser()
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    folder = path if path.is_dir() else folder_of(name)
    described = None if folder is None else described_file(folder)
    return None if described is None else described.path
