"""Imports of large libraries leave the process as it was, and questions about packages are answered as before."""

from __future__ import annotations

import gc
import importlib.metadata

import pytest

from veneer.plain.libraries import libraries_loading


def test_packages_are_looked_up_when_asked_and_garbage_is_collected_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.plain.progress.QUIET_SECONDS", 60.0)
    read = importlib.metadata.packages_distributions
    with libraries_loading():
        found = importlib.metadata.packages_distributions()
        assert not gc.isenabled()
        assert "pytest" in found["pytest"]
        assert dict(found) == dict(read())
        assert len(found) == len(read())
        assert "no package of this name" not in found
    assert gc.isenabled()
    assert importlib.metadata.packages_distributions is read
