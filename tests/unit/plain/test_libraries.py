"""Imports of large libraries leave the process as it was, and questions about packages are answered as before."""

from __future__ import annotations

import atexit
import gc
import importlib.metadata
import sys

import pytest

from veneer.plain.libraries import libraries_loading


def test_packages_are_looked_up_when_asked_and_garbage_is_collected_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.plain.progress.QUIET_SECONDS", 60.0)
    read = importlib.metadata.packages_distributions
    with libraries_loading():
        found = importlib.metadata.packages_distributions()
        assert not gc.isenabled()
        monkeypatch.setattr("veneer.plain.libraries._read", lambda: pytest.fail("all metadata was read"))
        assert found["transformers"] == ["transformers"]
        monkeypatch.setattr("veneer.plain.libraries._read", read)
        assert "pytest" in found["pytest"]
        assert dict(found) == dict(read())
        assert len(found) == len(read())
        assert "no package of this name" not in found
    assert gc.isenabled()
    assert importlib.metadata.packages_distributions is read


def test_what_the_first_imports_made_is_no_garbage_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.plain.progress.QUIET_SECONDS", 60.0)
    before = gc.get_freeze_count()
    with libraries_loading():
        pass
    assert gc.get_freeze_count() == before
    monkeypatch.delitem(sys.modules, "torch")
    try:
        with libraries_loading():
            pass
        assert gc.get_freeze_count() > before
    finally:
        atexit.unregister(gc.unfreeze)
