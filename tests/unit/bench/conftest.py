"""Scripts of bench/ as modules, and the two faults that their checks must find."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[3]
Fault = Callable[[Any], Any]


@pytest.fixture
def script() -> Callable[[str], ModuleType]:
    """Import a script by its name alone."""

    def imported(name: str) -> ModuleType:
        (path,) = (ROOT / "bench").rglob(f"{name}.py")
        return import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))

    return imported


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a script's main with arguments, in this process: its models can be spoilt."""

    def run(module: ModuleType, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [str(module.__file__), *map(str, arguments)])
        module.main()

    return run


def ignore_adapter(model: Any) -> Any:
    """The model computes as its base does."""
    model.disable_adapter_layers()
    return model


def zero_one_gradient(model: Any) -> Any:
    """The backward pass forgets one trained tensor."""
    trained = [p for p in model.parameters() if p.requires_grad]
    trained[len(trained) // 2].register_hook(torch.zeros_like)
    return model


@pytest.fixture(params=[ignore_adapter, zero_one_gradient], ids=lambda fault: fault.__name__)
def fault(request: pytest.FixtureRequest) -> Fault:
    found: Fault = request.param
    return found
