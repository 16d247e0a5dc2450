"""Comparison of the base given for an adapter with the base that the adapter names; torch is not imported."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from veneer.disk.known_name import known_name
from veneer.store.known import KNOWN, is_fetched, model_folder

_MODEL_CONFIG = "config.json"
_HASHED = re.compile(r"(.+)@sha256:([0-9a-f]{64})")  # known names of GGUF files
_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+", re.ASCII)
# The same model in another form of its weights: quantized, or as a GGUF file. "*+" keeps the search from going back.
_FORM = re.compile(
    r"(?:\.gguf|[-._](?:unsloth|bnb|gguf|gptq|awq|[248]bit|int[48]|fp8|f16|bf16|f32|i?q[1-8](?:_[a-z0-9]+)*+))+$"
)
_LONGEST = 256  # characters of a name that is compared


class GivenBase:
    """Base model that a user gave for adapters, to compare with the bases that they name.

    ``root`` is the name that was given, ``names`` are its other names, and ``folder`` is its folder. Two names differ
    only if both are names of models, not paths: a folder may hold any model. Two folders on this machine are compared
    by their files, and so are fetched models.
    """

    def __init__(self, root: str = "", names: Collection[str] = (), folder: Path | None = None) -> None:
        self._root, self._folder = known_name(root), folder
        self._names = {_model(known_name(name)) for name in (root, *names) if name}

    def warning(self, named: str | None) -> str:
        """Return a warning if ``named``, the base that an adapter names, is another model than this base. Return "" if
        the two may be one model.
        """
        if not named or len(named) > _LONGEST or not self._root or not self._differs(named):
            return ""
        return (
            f"the adapter names the base {named}, and this is {self._root}: the result is wrong if these are two "
            "models. Use the adapter with its own base"
        )

    def _differs(self, named: str) -> bool:
        here, is_one_name = _folder_of(named), _model(named) in self._names
        if here is not None and self._folder is not None and not (is_one_name and here.name != self._folder.name):
            return not _is_copy(here, self._folder)
        if is_one_name or os.path.isdir(named):
            return False
        return _is_name(named) and _is_name(self._root)


def is_one_model(one: str, other: str) -> bool:
    """Return True if two names mean the same model, judged by the names, or by the files of two folders."""
    here, there, is_one_name = _folder_of(one), _folder_of(other), _model(known_name(one)) == _model(known_name(other))
    if here is None or there is None or (is_one_name and here.name != there.name):  # one model in two formats
        return is_one_name
    return _is_copy(here, there)


def _folder_of(named: str) -> Path | None:
    """Return the folder of a model that is on this machine, by its path or by its name in `KNOWN`."""
    folder = model_folder(named) if named in KNOWN and is_fetched(named) else Path(os.path.expanduser(named))
    return folder if os.path.isdir(folder) else None


def _is_name(name: str) -> bool:
    """Return True for a model's name (a hub id, or a GGUF file's name with its hash), False for a path."""
    return bool(_HASHED.fullmatch(name)) or (_ID.fullmatch(name) is not None and not os.path.exists(name))


def _model(name: str) -> str:
    """Return the last part of a model's name in lower case, without the suffix for its weights' format. Two names with
    equal results mean the same model.
    """
    hashed = _HASHED.fullmatch(name)
    last = re.split(r"[/\\]", (hashed[1] if hashed else name).rstrip("/\\"))[-1].lower()
    return _FORM.sub("", last) or last


def _is_copy(one: Path, other: Path) -> bool:
    """Return True if two paths lead to one folder, or to models with equal configs and sizes. Return True also if files
    cannot be read.
    """
    try:
        return one.resolve() == other.resolve() or _stamp(one) == _stamp(other)
    except OSError:
        return True


def _stamp(folder: Path) -> tuple[bytes, list[int]]:
    config = folder / _MODEL_CONFIG
    sizes = sorted(file.stat().st_size for file in folder.glob("*.safetensors"))
    return config.read_bytes() if config.is_file() else b"", sizes
