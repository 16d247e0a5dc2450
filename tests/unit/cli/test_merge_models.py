"""`veneer merge-models`: the models, the options, the messages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from typer.testing import Result


def state(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_two_models_become_one(veneer: Callable[..., Result], model_folder: Path, tmp_path: Path) -> None:
    for seed in (8, 9):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        model.save_pretrained(tmp_path / f"tuned{seed}")
    command = ("merge-models", model_folder, tmp_path / "tuned8", tmp_path / "tuned9", "-o", tmp_path / "out")
    result = veneer(*command, "--weights", "0.7 -0.3", "--scale", "2", "--normalize")
    assert result.exit_code == 0, result.output
    assert "2 models by task_arithmetic" in result.stdout
    base, a, b = state(model_folder), state(tmp_path / "tuned8"), state(tmp_path / "tuned9")
    for name, value in state(tmp_path / "out").items():
        wanted = base[name] + 2 * (0.7 * (a[name] - base[name]) - 0.3 * (b[name] - base[name])) / 0.4
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)

    again = veneer(*command)
    assert (again.exit_code, "is not empty" in again.stderr) == (2, True)
    forced = veneer(*command, "--how", "ties", "--density", "0.3", "--vote", "frequency", "--force")
    assert forced.exit_code == 0, forced.output
    assert "2 models by ties" in forced.stdout


def test_wrong_options_are_one_message(veneer: Callable[..., Result], model_folder: Path, tmp_path: Path) -> None:
    cases = {
        ("--how", "ties"): "is needed by how='ties'",
        ("--weights", "1 2"): "2 numbers for 1 inputs",
        ("--how", "slerp"): "must be one of",
    }
    for options, message in cases.items():
        result = veneer("merge-models", model_folder, model_folder, "-o", tmp_path / "out", *options)
        assert (result.exit_code, message in result.stderr) == (2, True), result.output
