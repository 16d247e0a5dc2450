"""Every command and call that loads a model to compute with asks for the GPU of a machine that has one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments
from typer.testing import Result

from veneer import LLM, FastLanguageModel
from veneer.errors import ServingError
from veneer.model.memory.default_device import default_device
from veneer.recipe.recipe import Recipe, parse_recipe
from veneer.train import outcome
from veneer.train.recipe_trainer import make_trainer

Veneer = Callable[..., Result]
LOADERS = ("adapters.chosen", "adapters.fast_language_model", "serve.start", "train.base_model", "train.outcome")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices that loaders are asked for, which load nothing, on a machine that says it has a GPU."""
    found = list[str]()

    def load(*_: Any, device: Any = None, **__: Any) -> Any:
        found.append(torch.device("cpu" if device is None else device).type)
        raise ServingError("nothing is loaded here")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cuda", 0))
    for module in LOADERS:
        monkeypatch.setattr(f"veneer.{module}.load_model", load)
    return found


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i}:", "completion": f" {i % 2}"}) for i in range(8)))
    return path


def recipe_of(model: Path, rows: Path, output: Path, **more: Any) -> Recipe:
    return parse_recipe({"model": {"source": str(model)}, "data": {"train": str(rows)}, "output": str(output)} | more)


def test_commands(
    veneer: Veneer, model_folder: Path, adapter_folder: Path, rows: Path, tmp_path: Path, asked: list[str]
) -> None:
    commands = [
        ("generate", model_folder, "-p", "x", "--raw"),
        ("generate", model_folder, "--input", rows, "-o", tmp_path / "out.jsonl", "--raw"),
        ("chat", model_folder),
        ("eval", model_folder, "-d", rows, "-m", "perplexity"),
        ("intrinsic", model_folder, "-d", rows, "-o", tmp_path / "curve", "--dims", "7"),
        ("serve", model_folder),
        ("export", "as-lora", adapter_folder, "--base", model_folder, "-o", tmp_path / "lora", "--rank", 3),
    ]
    for command in commands:
        asked.clear()
        result = veneer(*command)
        assert (command[0], asked) == (command[0], ["cuda"]), result.output


def test_calls(model_folder: Path, asked: list[str]) -> None:
    for call in (
        lambda: FastLanguageModel.from_pretrained(str(model_folder), load_in_4bit=False),
        lambda: FastLanguageModel.from_pretrained(str(model_folder)),
        lambda: LLM(str(model_folder)),
    ):
        with pytest.raises(ServingError, match="nothing is loaded"):
            call()
    assert asked == ["cuda"] * 3


@pytest.mark.parametrize("task", ["sft", "full", "dpo"])
def test_training(model_folder: Path, rows: Path, tmp_path: Path, asked: list[str], task: str) -> None:
    more: dict[str, Any] = {"adapter": {"method": "full"}} if task == "full" else {}
    if task == "dpo":
        pairs = [{"prompt": "a", "chosen": f"{i}", "rejected": "c"} for i in range(4)]
        rows.write_text("\n".join(map(json.dumps, pairs)))
        more = {"task": "dpo"}
    with pytest.raises(ServingError, match="nothing is loaded"):
        make_trainer(recipe_of(model_folder, rows, tmp_path / "run", **more))
    assert asked == ["cuda"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_a_recipe_trained(
    model_folder: Path, rows: Path, tmp_path: Path, asked: list[str], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(model_folder, rows, tmp_path / "run", adapter={"method": method})
    with pytest.raises(ServingError, match="nothing is loaded"):
        outcome.trained_parts(recipe.model, recipe.method, tmp_path, None)
    assert asked == ["cuda"]


def test_files_are_compared_on_the_cpu(
    veneer: Veneer, model_folder: Path, adapter_folder: Path, asked: list[str], tmp_path: Path
) -> None:
    command = ("combine", adapter_folder, adapter_folder, "-o", tmp_path / "sum", "--base", model_folder)
    result = veneer(*command)
    assert asked == ["cpu"], result.output


def test_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_device() == torch.device("cpu")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "error: the GPU has no memory left"),
        (torch.AcceleratorError("CUDA error: unspecified launch failure\nX"), "error: CUDA error: unspecified launch"),
    ],
)
def test_a_gpu_that_fails_is_one_message(
    veneer: Veneer, model_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("veneer.adapters.chosen.load_model", fail)
    result = veneer("generate", model_folder, "-p", "x", "--raw")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(told)
