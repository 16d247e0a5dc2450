"""Table of the names that transformers' model files define.

Importing transformers reads its 2,000 files of models for it, twice. It is kept in the cache, once for each
installation.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from veneer.disk.atomic import write_atomically
from veneer.disk.cache import cache_dir
from veneer.errors import DiskError

_READER, _FUNCTION = "transformers.utils.import_utils", "create_import_structure_from_path"
_SETS, _ENTRIES = "set", "entries"
Read = Callable[[Any], Any]


@contextmanager
def table_kept() -> Iterator[None]:
    """Make an import of transformers in the block read its table of names from the cache, or write it there if it is
    missing.
    """
    finder = TableFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class TableFinder(MetaPathFinder):
    """Import hook for the one module of transformers that reads the table of names. It finds no other module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of the module that reads the table, with a loader that looks in the cache first; None for any
        other module.
        """
        spec = PathFinder.find_spec(fullname, path, target) if fullname == _READER else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _ask_first(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _ask_first(module: ModuleType) -> None:
    read: Read | None = getattr(module, _FUNCTION, None)
    if read is None:
        return  # another release of transformers
    models = Path(str(module.__file__)).parents[1] / "models"
    known: list[str] = []

    def read_once(path: Any) -> Any:
        if Path(path) not in (models, models / "__init__.py"):
            return read(path)
        if not known:
            known.append(_text(models, read))
        return _decoded(json.loads(known[0]))

    setattr(module, _FUNCTION, read_once)


def _text(models: Path, read: Read) -> str:
    """Return the table as JSON: from the cache, else read from the source files and cached."""
    file = _file(models)
    if file is not None:
        with suppress(OSError, ValueError, LookupError, TypeError):
            text = file.read_text(encoding="utf-8")
            _decoded(json.loads(text))
            return text
    text = json.dumps(_encoded(read(models)))
    if file is not None:
        with suppress(DiskError):
            write_atomically(file, text.encode())
    return text


def _file(models: Path) -> Path | None:
    """Return the cache file of an installed package, named by a stamp of its files.

    Return None for a package in development, because its files change, and for a user without a home directory.
    """
    records = list(models.parents[1].glob("transformers-*.dist-info/RECORD"))
    if len(records) != 1:
        return None
    try:
        folder = cache_dir() / "imports"
    except RuntimeError:  # of pathlib: a container's user may have no name, and no HOME
        return None
    stamps = [(str(path), path.stat().st_mtime_ns) for path in (records[0], models)]
    name = hashlib.blake2b(repr(stamps).encode(), digest_size=8).hexdigest()
    return folder / f"transformers-{name}.json"


def _encoded(table: Any) -> Any:
    """Convert the table to types that JSON has: sets of names, and dicts keyed by names or by sets of names."""
    if isinstance(table, dict):
        return {_ENTRIES: [[_encoded(key), _encoded(value)] for key, value in table.items()]}
    return {_SETS: sorted(table)} if isinstance(table, (set, frozenset)) else table


def _decoded(table: Any) -> Any:
    if isinstance(table, str):
        return table
    if _SETS in table:
        return set(table[_SETS])
    entries = ((_decoded(key), _decoded(value)) for key, value in table[_ENTRIES])
    return {frozenset(key) if isinstance(key, set) else key: value for key, value in entries}
