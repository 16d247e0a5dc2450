"""The table that transformers reads from its files comes from the cache, and is the same."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import transformers.utils.import_utils as own

from veneer.plain import import_table
from veneer.plain.import_table import TableFinder, table_kept

READS = """
reads = []
def create_import_structure_from_path(path):
    reads.append(str(path))
    return {"llama": {frozenset({"torch"}): {"modeling_llama": {"LlamaModel", "LlamaConfig"}}, frozenset(): {}}}
"""


def loaded(utils: Path) -> ModuleType:
    """Another copy of the module, as an import in the block loads it."""
    spec = TableFinder().find_spec("transformers.utils.import_utils", [str(utils)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_transformers_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    utils = Path(str(own.__file__)).parent
    asked = utils.parent / "models" / "__init__.py"
    assert loaded(utils).define_import_structure(asked) == own.define_import_structure(asked)


def test_files_are_read_once_for_an_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    utils, record = tmp_path / "transformers" / "utils", tmp_path / "transformers-5.0.dist-info" / "RECORD"
    models = utils.parent / "models"
    for folder in (utils, models, record.parent):
        folder.mkdir(parents=True)
    (utils / "import_utils.py").write_text(READS)
    record.touch()
    first = loaded(utils)
    table = first.create_import_structure_from_path(models)
    table["llama"].clear()  # which is the caller's own
    assert list(first.create_import_structure_from_path(str(models / "__init__.py"))["llama"]) == [{"torch"}, set()]
    assert first.reads == [str(models)]
    (kept,) = (tmp_path / "cache" / "imports").iterdir()
    again = loaded(utils)
    assert list(again.create_import_structure_from_path(models)["llama"]) == [{"torch"}, set()]
    again.create_import_structure_from_path(models / "llama")
    assert again.reads == [str(models / "llama")]
    for damaged in ('{"entries": [["llama"]]}', "[1]", "{"):
        kept.write_text(damaged)
        assert "llama" in loaded(utils).create_import_structure_from_path(models)
    (models / "new.py").touch()
    loaded(utils).create_import_structure_from_path(models)
    assert len(list(kept.parent.iterdir())) == 2
    monkeypatch.setenv("VENEER_CACHE", str(kept / "no folder"))
    assert "llama" in loaded(utils).create_import_structure_from_path(models)
    monkeypatch.setattr(import_table, "cache_dir", Path("~no one").expanduser)  # a user without a home
    assert "llama" in loaded(utils).create_import_structure_from_path(models)
    record.unlink()  # a package in development
    assert "llama" in loaded(utils).create_import_structure_from_path(models)
    (utils / "import_utils.py").write_text("another = 'release'")
    assert loaded(utils).another == "release"


def test_other_modules_are_found_as_ever() -> None:
    before = list(sys.meta_path)
    with table_kept():
        assert sys.meta_path[1:] == before
        assert TableFinder().find_spec("transformers.utils.generic", None) is None
    assert sys.meta_path == before
