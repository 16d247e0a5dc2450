"""`veneer serve`: what it refuses before it starts. Its routes are tested in tests/unit/serve."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from veneer.cli.app import app
from veneer.cli.serve import require_closed
from veneer.errors import ConfigError


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_others_are_let_in_only_where_that_is_meant(host: str) -> None:
    with pytest.raises(ConfigError, match="add --open"):
        require_closed(host, False)
    require_closed(host, True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_is_always_let_in(host: str) -> None:
    require_closed(host, False)


def test_a_folder_that_is_not_there(model_folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["serve", str(model_folder), "--adapters", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert "is no folder" in result.stderr


def test_a_context_that_the_model_has_not(model_folder: Path) -> None:
    result = CliRunner().invoke(app, ["serve", str(model_folder), "--max-model-len", "132"])
    assert result.exit_code == 2
    assert "context of 131" in result.stderr
