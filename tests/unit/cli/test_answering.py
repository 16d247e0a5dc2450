"""The answer of a command: by the engine of serving, or by transformers' generate with the reason in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

Veneer = Callable[..., Result]


@pytest.mark.parametrize(
    ("settings", "options", "said"),
    [
        ({"no_repeat_ngram_size": 2}, (), "generation_config.json sets no_repeat_ngram_size"),
        ({"min_p": 0.1, "suppress_tokens": [5]}, (), "sets min_p, suppress_tokens"),
        ({}, ("--dtype", "float16"), "float32 and bfloat16, and the model is in float16"),
        ({}, ("--temperature", 2.5), "temperature=2.5 must be between 0 and 2"),
        ({}, ("--temperature", 0.7, "--top-p", 0), "top_p=0.0 must be above 0"),
    ],
)
def test_where_the_engine_would_answer_otherwise_transformers_does(
    veneer: Veneer, model_folder: Path, tmp_path: Path, settings: dict[str, Any], options: tuple[Any, ...], said: str
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "odd")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, **settings}))
    result = veneer("generate", folder, "-p", "hi", "--max-new-tokens", 3, *options)
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("answers: transformers' generate (")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_line_says_that_the_engine_answers(veneer: Veneer, adapter_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    for command in (("generate", adapter_folder, "-p", "hi"), ("chat", adapter_folder)):
        assert veneer(*command, "--max-new-tokens", 2).stderr.startswith("answers: veneer's engine\n")
    command = ("eval", adapter_folder, "-d", tmp_path / "data.jsonl", "-m", "exact-match", "--max-new-tokens", 2)
    assert veneer(*command).stderr == "answers: veneer's engine\n"
