"""`veneer eval --recipe`, and perplexity of rows whose columns have other names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import Result

from veneer.data.asked_rows import as_templated
from veneer.errors import DataError
from veneer.recipe.recipe import parse_recipe
from veneer.train.rows import read_data

Veneer = Callable[..., Result]
PERPLEXITY = ("-m", "perplexity", "--json")


def measured(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_perplexity_of_other_columns_is_that_of_the_rows_written_out(
    veneer: Veneer, model_folder: Path, tmp_path: Path
) -> None:
    facts = [("sky", " blue"), ("grass", " green"), ("a", " b")]
    written = lines(tmp_path / "a.jsonl", [{"prompt": f"Of {q}?\n", "completion": a} for q, a in facts])
    other = lines(tmp_path / "b.jsonl", [{"thing": q, "colours": [a, " any"]} for q, a in facts])
    template = ("--prompt", "Of {thing}?\\n", "--answer-field", "colours")
    for more in ((), ("--whole-rows",)):
        wanted = measured(veneer("eval", model_folder, "-d", written, *PERPLEXITY, *more))
        found = measured(veneer("eval", model_folder, "-d", other, *PERPLEXITY, *template, *more))
        assert {**found, "data": 0, "seconds": 0} == {**wanted, "data": 0, "seconds": 0}
    texts = lines(tmp_path / "c.jsonl", [{"text": f"Of {q}?\n"} for q, _ in facts])
    wanted = measured(veneer("eval", model_folder, "-d", texts, *PERPLEXITY))
    found = measured(veneer("eval", model_folder, "-d", other, *PERPLEXITY, *template[:2]))
    assert (found["value"], found["n_tokens"]) == (wanted["value"], wanted["n_tokens"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--answer-field", "colours"), "--metric perplexity reads --answer-field together with --prompt"),
        (("--prompt", "{thing}", "--answer-field", "color"), "row 1: no field 'color'; it has ['colours', 'thing']"),
        (("--prompt", "{think}"), "row 1: the template '{think}' asks for the field 'think'"),
        (("--prompt", "{thing", "--answer-field", "colours"), "does not fit the columns"),
    ],
)
def test_templates_that_do_not_fit(
    veneer: Veneer, model_folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    data = lines(tmp_path / "b.jsonl", [{"thing": "sky", "colours": [" blue"]}])
    result = veneer("eval", model_folder, "-d", data, *PERPLEXITY, *arguments)
    assert (result.exit_code, message in result.stderr) == (2, True), result.output


def test_a_list_without_an_answer_is_named_by_its_row() -> None:
    with pytest.raises(DataError, match="row 2: the field 'a' holds no answer, but \\[\\]"):
        as_templated([{"a": ["x"]}, {"a": []}], "p", "a")


@pytest.fixture
def recipe(tmp_path: Path, model_folder: Path) -> Path:
    """A recipe with templates, chat and a system message, whose run is yet to be."""
    rows = [{"thing": f"t{i}", "colour": f"c{i % 3}"} for i in range(20)]
    values = {
        "model": {"source": str(model_folder)},
        "data": {
            "train": str(lines(tmp_path / "rows.jsonl", rows)), "eval_fraction": 0.25, "chat": True, "system": "be",
            "prompt": "Of {thing}", "completion": "{colour}",
        },
        "output": str(tmp_path / "run"),
        "seed": 3,
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def change(recipe: Path, **parts: Any) -> dict[str, Any]:
    values = yaml.safe_load(recipe.read_text()) | parts
    recipe.write_text(yaml.safe_dump(values))
    return values


def with_adapter(recipe: Path, adapter: Path) -> None:
    (recipe.parent / "run").mkdir()
    (recipe.parent / "run" / "adapter").symlink_to(adapter)


def test_a_recipe_names_the_model_the_adapter_the_rows_and_how_they_are_read(
    veneer: Veneer, model_folder: Path, adapter_folder: Path, recipe: Path, tmp_path: Path
) -> None:
    with_adapter(recipe, adapter_folder)
    found = measured(veneer("eval", "--recipe", recipe, *PERPLEXITY))
    held_out = read_data(parse_recipe(yaml.safe_load(recipe.read_text())).data, 3).eval
    assert held_out is not None
    assert len(held_out) == found["n_rows"] == 5
    by_hand = lines(tmp_path / "held.jsonl", [dict(row) for row in held_out])
    wanted = measured(veneer("eval", model_folder, "-a", adapter_folder, "-d", by_hand, *PERPLEXITY))
    assert (found["value"], found["n_tokens"]) == (wanted["value"], wanted["n_tokens"])
    assert found["adapter"] == str(tmp_path / "run" / "adapter")
    assert found["data"] == f"0.25 of {tmp_path / 'rows.jsonl'}, held out"
    assert found["model"] == str(model_folder)


def test_other_rows_are_read_as_the_recipe_reads(
    veneer: Veneer, model_folder: Path, adapter_folder: Path, recipe: Path, tmp_path: Path
) -> None:
    with_adapter(recipe, adapter_folder)
    other = lines(tmp_path / "other.jsonl", [{"thing": "x", "colour": "y"}, {"thing": "z", "colour": "w"}])
    turns = [("Of x", "y"), ("Of z", "w")]
    chats = [
        {
            "messages": [
                {"role": r, "content": c} for r, c in zip(("system", "user", "assistant"), ("be", *t), strict=True)
            ]
        }
        for t in turns
    ]
    wanted = measured(veneer("eval", adapter_folder, "-d", lines(tmp_path / "chats.jsonl", chats), *PERPLEXITY))
    found = measured(veneer("eval", "--recipe", recipe, "-d", other, *PERPLEXITY))
    assert (found["value"], found["n_rows"], found["data"]) == (wanted["value"], 2, str(other))
    limited = measured(
        veneer("eval", "--recipe", recipe, "--limit", 1, "-m", "exact-match", "--max-new-tokens", 2, "--json")
    )
    assert limited["n_rows"] == 1


def test_a_model_trained_whole_is_taken_itself_and_a_quantized_base_as_it_was(
    veneer: Veneer, model_folder: Path, adapter_folder: Path, recipe: Path, tmp_path: Path
) -> None:
    with_adapter(recipe, adapter_folder)
    dense = measured(veneer("eval", "--recipe", recipe, *PERPLEXITY))
    change(recipe, model={"source": str(model_folder), "quantization": "int8"})
    assert measured(veneer("eval", "--recipe", recipe, *PERPLEXITY))["value"] != dense["value"]
    (tmp_path / "run" / "model").symlink_to(model_folder)
    values = change(recipe, model={"source": str(model_folder)}, adapter={"method": "full"})
    found = measured(veneer("eval", "--recipe", recipe, *PERPLEXITY))
    refused = veneer("eval", "--recipe", recipe, "--with-base", *PERPLEXITY)
    assert (refused.exit_code, "trains all weights: give first a recipe" in refused.stderr) == (2, True), refused.output
    assert found["adapter"] == f"{values['output']}/model"
    assert found["value"] != dense["value"]


def test_two_recipes_are_compared_on_the_same_rows(
    veneer: Veneer, model_folder: Path, adapter_folder: Path, recipe: Path, tmp_path: Path
) -> None:
    with_adapter(recipe, adapter_folder)
    other = tmp_path / "other.yaml"
    other.write_text(recipe.read_text())
    change(other, output=str(tmp_path / "whole"), adapter={"method": "full"})
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "model").symlink_to(model_folder)
    both = measured(veneer("eval", "--recipe", recipe, "--recipe", other, "--with-base", *PERPLEXITY))
    saved = [str(tmp_path / "run" / "adapter"), str(tmp_path / "whole" / "model")]
    assert [each["adapter"] for each in both["results"]] == [None, *saved]
    base, adapted, whole = both["results"]
    assert base["value"] == whole["value"] != adapted["value"]  # the model was never trained
    alone = measured(veneer("eval", "--recipe", recipe, *PERPLEXITY))
    assert adapted["value"] == pytest.approx(alone["value"], rel=1e-4)
    assert [each["second"] for each in both["differences"]] == saved
    assert both["differences"][1]["interval"] == [0, 0]
    labels = ("-m", "labels", "--predictions", tmp_path / "p.jsonl")
    shown = veneer("eval", "--recipe", recipe, "--recipe", other, *labels)
    assert shown.exit_code == 0, shown.output
    assert f"difference from {saved[0]} (exact McNemar" in shown.stdout
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["adapter"] for row in rows] == [each for each in saved for _ in range(5)]


def test_recipes_of_other_rows_are_refused_before_a_model_is_loaded(
    veneer: Veneer, adapter_folder: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_adapter(recipe, adapter_folder)
    other = tmp_path / "other.yaml"
    other.write_text(recipe.read_text())
    change(other, seed=4)
    command = ("eval", "--recipe", recipe, "--recipe", other)
    data = lines(tmp_path / "other.jsonl", [{"thing": "x", "colour": "y"}, {"thing": "z", "colour": "w"}])
    assert len(measured(veneer(*command, "-d", data, *PERPLEXITY))["results"]) == 2

    def loads(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("veneer.cli.subject.trained_parts", loads)
    refused = veneer(*command, *PERPLEXITY)
    assert (refused.exit_code, "rows with different answers: give --data FILE" in refused.stderr) == (2, True)
    refused = veneer("eval", "--recipe", recipe, "--recipe", "nowhere.yaml", *PERPLEXITY)
    assert (refused.exit_code, "the recipe nowhere.yaml cannot be read" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say what to measure: MODEL and --data FILE, or --recipe FILE"),
        (("MODEL",), "say what to measure"),
        (("MODEL", "--recipe", "RECIPE", "--chat", "--dtype", "float32"), "leave out MODEL, --chat, --dtype"),
        (("--recipe", "RECIPE", "--prompt", "x", "-a", "y"), "leave out --adapter, --prompt"),
        (("--recipe", "RECIPE"), "has saved nothing yet"),
        (("--recipe", "nowhere.yaml"), "cannot be read"),
        (("--recipe", "RECIPE", "--recipe", "RECIPE"), "is given twice, and a run does not differ from itself"),
    ],
)
def test_what_does_not_go_with_a_recipe(
    veneer: Veneer, model_folder: Path, recipe: Path, arguments: tuple[str, ...], message: str
) -> None:
    named = {"MODEL": str(model_folder), "RECIPE": str(recipe)}
    result = veneer("eval", *(named.get(each, each) for each in arguments), "-m", "perplexity")
    assert (result.exit_code, message in result.stderr) == (2, True), result.output


def test_a_recipe_without_held_out_rows_or_of_several_runs(veneer: Veneer, adapter_folder: Path, recipe: Path) -> None:
    with_adapter(recipe, adapter_folder)
    values = yaml.safe_load(recipe.read_text())
    change(recipe, data={**values["data"], "eval_fraction": 0.0})
    refused = veneer("eval", "--recipe", recipe, *PERPLEXITY)
    assert (refused.exit_code, "give --data FILE" in refused.stderr) == (2, True), refused.output
    change(recipe, sweep={"grid": {"adapter.r": [2, 4]}})
    refused = veneer("eval", "--recipe", recipe, *PERPLEXITY)
    assert (refused.exit_code, f"veneer eval {values['output']}/NAME/adapter" in refused.stderr) == (2, True)


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_answers_of_a_recipe_are_those_of_transformers(
    veneer: Veneer, model_folder: Path, adapter_folder: Path, recipe: Path, quantization: str, monkeypatch: Any
) -> None:
    with_adapter(recipe, adapter_folder)
    change(recipe, model={"source": str(model_folder), "quantization": quantization, "dtype": "float32"})
    command = ("eval", "--recipe", recipe, "-m", "exact-match", "--max-new-tokens", 9, "--predictions")
    told = veneer(*command, recipe.parent / "a.jsonl")
    assert told.exit_code == 0, told.output
    assert "answers:" in told.stderr
    monkeypatch.setattr("veneer.answer.engine._slow", lambda base: "a test asks for it")
    assert "(a test asks for it)" in veneer(*command, recipe.parent / "b.jsonl").stderr
    assert (recipe.parent / "a.jsonl").read_text() == (recipe.parent / "b.jsonl").read_text()
    assert quantization != "none" or told.stderr == "answers: veneer's engine\n"


def test_an_adapter_beside_itself_is_refused(
    veneer: Veneer, model_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    data = lines(tmp_path / "rows.jsonl", [{"text": "the cat sat"}])
    refused = veneer("eval", model_folder, "-a", adapter_folder, "-a", adapter_folder, "-d", data, *PERPLEXITY)
    assert (refused.exit_code, f"--adapter {adapter_folder} is given twice" in refused.stderr) == (2, True)


def test_a_run_is_named_by_its_folder(veneer: Veneer, adapter_folder: Path, recipe: Path, tmp_path: Path) -> None:
    with_adapter(recipe, adapter_folder)
    wanted = measured(veneer("eval", "--recipe", recipe, *PERPLEXITY))
    values = parse_recipe(yaml.safe_load(recipe.read_text())).model_dump()
    record = {"status": "finished", "recipe": {**values, "output": "elsewhere"}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    found = measured(veneer("eval", "--recipe", tmp_path / "run", *PERPLEXITY))
    assert {**found, "seconds": 0} == {**wanted, "seconds": 0}
    change(recipe, output=str(tmp_path / "other"))
    for given, message in (
        (recipe, "Of a run with --set output=FOLDER, give that folder"),
        (tmp_path, f"{tmp_path} is no run: it holds no run.json"),
    ):
        refused = veneer("eval", "--recipe", given, *PERPLEXITY)
        assert (refused.exit_code, message in refused.stderr) == (2, True), refused.output
    (tmp_path / "run" / "run.json").write_text(json.dumps({**record, "recipe": {"model": 3}}))
    refused = veneer("eval", "--recipe", tmp_path / "run", *PERPLEXITY)
    assert (refused.exit_code, "holds no recipe that can be read" in refused.stderr) == (2, True), refused.output
