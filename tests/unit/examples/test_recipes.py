"""Each recipe of examples/recipes runs: two steps on a tiny model, with rows of the form that it names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from bare_runs import draw_nothing, plan_once
from models import byte_tokenizer, llama_config
from veneer.cli.app import app

RECIPES = Path(__file__).parents[3] / "examples" / "recipes"


def turns(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") if len(texts) % 2 == 0 else ("system", "user", "assistant")
    return [{"role": roles[i % len(roles)], "content": text} for i, text in enumerate(texts)]


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "chat": lambda i: {"messages": turns(f"hello {i}", "hi", f"and {i + 1}?", "yes")},
    "classification": lambda i: {"text": f"text {i}", "label_text": ["World", "Sports"][i % 2]},
    "continued": lambda i: {"text": f"Once there were {i} mice."},
    "distill": lambda i: ROWS["classification"](i),
    "extraction": lambda i: {"messages": turns("as JSON", f"lunch at {i}", json.dumps({"start": i}))},
    "ia3": lambda i: ROWS["extraction"](i),
    "miss": lambda i: ROWS["extraction"](i),
    "preference": lambda i: {"prompt": f"and {i}?", "chosen": f"{i}, yes", "rejected": "no"},
    "text_to_sql": lambda i: {"question": f"how many {i}?", "context": "CREATE TABLE t (a)", "answer": f"SELECT {i}"},
}
SHIPPED = {
    "labels": "labels",
    "json": "orders",
    "calculator": "sums",
    "game": "games",
}  # recipes with rows of their own


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    sizes = {"vocab_size": 260, "hidden_size": 72, "intermediate_size": 83, "max_position_embeddings": 659}
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(llama_config(**sizes, eos_token_id=0, bos_token_id=None, pad_token_id=0)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_every_recipe_is_tried() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*ROWS, *SHIPPED}


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.usefixtures("known_machine")
@pytest.mark.parametrize("name", sorted(ROWS))
def test_it_trains_and_saves(name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_once(monkeypatch.setattr)
    draw_nothing(monkeypatch.setattr)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(ROWS[name](i)) + "\n" for i in range(53)))
    recipe = RECIPES / f"{name}.yaml"
    own = {"model.source": model, "data.train": tmp_path / "rows.jsonl", "output": tmp_path / "run"}
    if re.search(r"^  eval: ", recipe.read_text(), flags=re.M):
        own["data.eval"] = tmp_path / "rows.jsonl"
    short = {"training.max_steps": 2, "training.max_length": 97, "training.eval_steps": 2, "training.report_to": "none"}
    changes = [f"{key}={value}" for key, value in {**own, **short}.items()]
    run("train", recipe, *(part for change in changes for part in ("--set", change)))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["results"]["steps"]) == ("finished", 2)
    assert "eval_loss" in record["results"]
    assert "method" in run("info", tmp_path / "run" / "adapter")


@pytest.mark.usefixtures("known_machine")
@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_it_learns_from_drawn_answers_to_its_own_rows(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_once(monkeypatch.setattr)
    draw_nothing(monkeypatch.setattr)
    own = {"model.source": model, "output": tmp_path / "run", "data.eval_limit": 3, "rollouts.engine": "engine"}
    short = {"max_steps": 2, "eval_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4,
             "report_to": "none", "max_completion_length": 24}  # fmt: skip
    changes = [*own.items(), *((f"training.{key}", value) for key, value in short.items())]
    run("train", RECIPES / f"{name}.yaml", *(part for key, value in changes for part in ("--set", f"{key}={value}")))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["results"]["steps"]) == ("finished", 2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "rollouts" / "0_of_1.jsonl").read_text().splitlines()]
    assert len(lines) == 16
    assert all(line["reward"] is not None for line in lines)


def test_what_a_recipe_says_to_do_next_is_a_command_of_its_own_run() -> None:
    for path in RECIPES.glob("*.yaml"):
        text = path.read_text()
        (output,) = re.findall(r"^output: (\S+)", text, flags=re.M)
        assert output == f"runs/{path.stem}"
        (command,) = re.findall(r"^# then: (veneer .*)", text, flags=re.M)
        words = command.split()
        assert f"examples/recipes/{path.name}" in words or f"{output}/adapter" in words or output in words
