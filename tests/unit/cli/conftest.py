"""A tiny chat model, adapters for it, and a runner for the commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from chat_models import adapter_folder as adapter_folder
from chat_models import fill as fill
from chat_models import model_folder as model_folder
from chat_models import tiny_model as tiny_model
from veneer import IA3Config, get_peft_model
from veneer.cli.app import app


@pytest.fixture(scope="session")
def other_adapter(model_folder: Path) -> Path:
    """An adapter of a model of another width."""
    folder = model_folder.parent / "other"
    model = get_peft_model(tiny_model(hidden=24), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def veneer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, known_machine: None) -> Callable[..., Result]:
    """Runs a command in a wide terminal with a cache of its own."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: object, input: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)

    return run
