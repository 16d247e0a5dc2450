"""A tiny chat model, adapters for it, and a runner for the commands."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from chat_models import adapter_folder as adapter_folder
from chat_models import fill as fill
from chat_models import model_folder as model_folder
from chat_models import tiny_model as tiny_model
from veneer import IA3Config, get_peft_model
from veneer.cli.app import app
from veneer.plain import progress

_EARLY = """
import contextlib, io, json, sys
from veneer.cli.app import app

for command in json.loads(sys.argv[1]):
    code, told = 0, io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            app(command)
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, " ".join(told.getvalue().split())]))
    assert not {"torch", "transformers", "trl"} & sys.modules.keys(), command
"""


def told_early(commands: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
    """The exit codes and messages of commands, which one new interpreter runs; none of them may import torch."""
    run = [sys.executable, "-c", _EARLY, json.dumps(commands)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [(code, told) for code, told in map(json.loads, done.stdout.splitlines())]


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
    monkeypatch.setattr(progress, "QUIET_SECONDS", 60.0)  # what is printed does not depend on the machine's load

    def run(*arguments: object, input: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)

    return run
