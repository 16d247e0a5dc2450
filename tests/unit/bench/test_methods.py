"""bench/training/methods.py and bench/training/snippet9.py: both sides compute the same, and every row comes out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bench.lora_step import adapted_by, agree, base_of
from bench.tiny_model import write_tiny
from bench.training import methods
from launch import module

QUICK = ("--tiny", "--dtype", "float32", "--tokens", "12", "--repeats", "1", "--rows", "2")


def run(script: str, *arguments: str) -> str:
    done = module(f"bench.training.{script}", *QUICK, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def rows(output: str) -> list[str]:
    """The ways that a table has, in its order."""
    return re.findall(r"^(\S.*?)  +\d+\.\d{3} +\d+\.\d{3} +\d+\.\d\dx", output, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("dropout", [
            "PEFT, dropout 0.05", "veneer, dropout 0.05", "PEFT, dropout 0.0", "veneer, dropout 0.0",
            "TRL's SFTTrainer, dropout 0.05", "veneer's SFTTrainer, dropout 0.05",
        ]),
        ("methods", [f"{side}, {method}" for method in ("LoRA", "DoRA", "IA3") for side in ("veneer", "PEFT")]),
        ("mixed", ["one method a row", "LoRA in every row"]),
    ],
)  # fmt: skip
def test_a_part_compares_its_sides_and_times_them(part: str, names: list[str]) -> None:
    output = run("methods", "--parts", part, "--bases", "dense", "--members", "lora", "dora", "ia3", "prefix")
    assert rows(output) == names
    assert "apart by 0.00" in output
    assert len(re.findall(r"goal: at most \d\.\d\d of .* (?:reached|missed)", output)) == (1 if part == "mixed" else 2)


def test_the_snippet_stands_beside_peft_and_its_own_ways() -> None:
    output = run("snippet9", "--base", "dense")
    assert rows(output) == [
        "PEFT", "veneer, as it stands", "veneer, nothing recomputed", "veneer, blocks recomputed",
    ]  # fmt: skip
    assert re.search(r"PEFT takes \d+\.\d\dx the time of the snippet as it stands", output)


def test_sides_that_part_are_not_timed() -> None:
    agree("losses", [1.0, 2.0], [1.0, 2.009])
    with pytest.raises(SystemExit, match=r"part by more than 0\.5%"):
        agree("losses", [1.0, 2.0], [1.0, 2.011])


def test_another_rate_of_dropout_is_noticed(tmp_path: Path) -> None:
    place = write_tiny(tmp_path)
    models = []
    for rate in (0.3, 0.1, 0.3):
        settings = {**methods.ARTICLE, "lora_dropout": rate, "init_lora_weights": False}
        torch.manual_seed(3)
        models.append(adapted_by("veneer", base_of("veneer", "dense", place, torch.float32), "LoraConfig", settings))
    ids = methods.tokens_of(models[0], 1, 16).expand(16, -1)
    methods.same_variation(models[0], models[2], ids)
    with pytest.raises(SystemExit, match="same rate"):
        methods.same_variation(models[0], models[1], ids)
