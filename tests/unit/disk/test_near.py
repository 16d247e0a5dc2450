"""Paths nearest to one that leads nowhere: which kinds of entries are suggested."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer.disk.near import near_paths
from veneer.errors import ConfigError
from veneer.store.adapter.folder import require_adapter


def test_hidden_names_are_not_suggested(tmp_path: Path) -> None:
    (tmp_path / ".runs").mkdir()
    assert near_paths(tmp_path / "runs") == []
    (tmp_path / "rnus").mkdir()
    assert near_paths(tmp_path / "runs") == [str(tmp_path / "rnus")]


def test_an_adapter_is_looked_for_among_folders(tmp_path: Path) -> None:
    (tmp_path / "adapter.log").touch()
    with pytest.raises(ConfigError, match=r"there is no such folder. Give one that holds adapter_config.json"):
        require_adapter(tmp_path / "adapter")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").touch()
    assert near_paths(tmp_path / "adapter") == [str(tmp_path / "adapters"), str(tmp_path / "adapter.log")]
    assert near_paths(tmp_path / "adapter", folders=True) == [str(tmp_path / "adapters")]
    assert near_paths(tmp_path / "rnus" / "first", folders=True) == [str(tmp_path / "runs")]
