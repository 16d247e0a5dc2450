"""`veneer eval` and `veneer merge`: results, options that a metric does not read, messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import Result

from veneer import PeftModel
from veneer.answer.engine import EngineAnswerer
from veneer.cli.pages.eval import READ
from veneer.evaluate.metric import METRICS
from veneer.evaluate.scoring import Answering

Veneer = Callable[..., Result]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"text {i}:", "completion": " good" if i % 2 else " bad"} for i in range(5)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def measured(result: Result) -> dict[str, object]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_labels_with_predictions(veneer: Veneer, model_folder: Path, data: Path, tmp_path: Path) -> None:
    command = ("eval", model_folder, "-d", data, "-m", "labels", "--json", "--predictions", tmp_path / "p.jsonl")
    facts = measured(veneer(*command))
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert facts["n_rows"] == len(rows) == 5
    assert facts["value"] == sum(row["right"] for row in rows) / 5
    assert all(row["right"] == (row["prediction"] == row["answers"][0].strip()) for row in rows)
    assert measured(veneer(*command, "--limit", 2))["n_rows"] == 2


def test_an_adapter_changes_perplexity(veneer: Veneer, model_folder: Path, adapter_folder: Path, data: Path) -> None:
    plain = measured(veneer("eval", model_folder, "-d", data, "-m", "perplexity", "--json"))
    adapted = measured(veneer("eval", model_folder, "-a", adapter_folder, "-d", data, "-m", "perplexity", "--json"))
    assert plain["n_tokens"] == adapted["n_tokens"] == 2 * 6 + 3 * 5
    assert plain["value"] != adapted["value"]
    whole = measured(veneer("eval", model_folder, "-d", data, "-m", "perplexity", "--whole-rows", "--json"))
    assert whole["n_tokens"] > plain["n_tokens"]


def test_answers_as_a_table(veneer: Veneer, model_folder: Path, data: Path) -> None:
    for arguments, shown in (
        (("regex", "--pattern", "^.", "--max-new-tokens", 3), "accuracy (regex)   0.0% (95%: 0.0% to 43.4%)"),
        (("labels",), "accuracy (labels)   60.0% (95%: 23.1% to 88.2%)"),
    ):
        found = veneer("eval", model_folder, "-d", data, "-m", *arguments)
        assert found.exit_code == 0, found.output
        assert shown in [line.strip() for line in found.stdout.splitlines()]


def test_every_option_of_a_metric_is_one_of_its_settings() -> None:
    assert {name: set(read) for name, read in READ.items()} == {
        name: {field.name for field in fields(metric)} for name, metric in METRICS.items()
    }


def test_a_text_that_ends_answers_may_be_a_line_break(
    veneer: Veneer, model_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, own = [], EngineAnswerer.answers
    monkeypatch.setattr(
        EngineAnswerer, "answers", lambda self, p, how, *rest: asked.append(how) or own(self, p, how, *rest)
    )
    command = ("eval", model_folder, "-d", data, "-m", "exact-match", "--json", "--max-new-tokens", 2)
    measured(veneer(*command, "--stop", "\\n", "--stop", "a\\tb"))
    assert asked == [Answering(max_new_tokens=2, stop=("\n", "a\tb"))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-m", "labels", "--pattern", "x"), "--pattern is not read by --metric labels"),
        (("-m", "perplexity", "--stop", "x"), "--stop is not read by --metric perplexity"),
        (("-m", "exact-match", "--context", "9"), "--context is not read by --metric exact-match"),
        (("-m", "regex"), "needs --pattern"),
        (("-m", "perplexity", "--predictions", "p.jsonl"), "--predictions is not read"),
        (("-m", "perplexity", "--context", "8", "--stride", "8"), "less than the context"),
        (("-m", "regex", "--pattern", "("), "not a regular expression"),
        (("-m", "labels", "--predictions", "nowhere/p.jsonl"), "there is no folder nowhere"),
        (("-m", "labels", "--predictions", "."), "is a folder: give the file"),
        (("-m", "accuracy"), "'-m': 'accuracy' is not one of"),
        (("-m", "labels", "--system", "be brief"), "system is for conversations"),
        (("-m", "labels", "--prompt", "{prompt}", "--system", "be brief"), "--system belongs to a chat, and --prompt"),
    ],
)
def test_options_that_do_not_fit_are_errors(
    veneer: Veneer, model_folder: Path, data: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = veneer("eval", model_folder, "-d", data, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("options", "end"),
    [((), "--answer-field answer\n"), (("--chat", "--system", "be brief"), "in place of --chat and --system\n")],
)
def test_rows_of_no_form_are_told_the_options_that_read_them(
    veneer: Veneer, model_folder: Path, tmp_path: Path, options: tuple[str, ...], end: str
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"asked": "?", "right": "!"}\n')
    told = veneer("eval", model_folder, "-d", tmp_path / "rows.jsonl", "-m", "exact-match", *options).stderr
    assert "say how to read them: --prompt" in told
    assert told.endswith(end)


def test_missing_data_and_models(veneer: Veneer, model_folder: Path, data: Path, other_adapter: Path) -> None:
    cases = {
        (model_folder, "-d", "nowhere.jsonl"): "there is no file",
        ("./nowhere", "-d", data): "no such folder or file",
        (model_folder, "-a", other_adapter, "-d", data): "does not fit the model",
    }
    for arguments, message in cases.items():
        result = veneer("eval", *arguments, "-m", "labels")
        assert (result.exit_code, message in result.stderr) == (2, True), result.output


def test_a_long_merge_names_the_folder_that_it_writes(
    veneer: Veneer, model_folder: Path, adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.plain.progress.LINE_SECONDS", 0.0)
    done = veneer("merge", "--base", model_folder, "--adapter", adapter_folder, "-o", tmp_path / "out")
    assert f"merging into {tmp_path / 'out'} 1/" in done.stderr


def test_merge_writes_a_model_that_answers_like_base_and_adapter(
    veneer: Veneer, model_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    command = ("merge", "--base", model_folder, "--adapter", adapter_folder, "-o", tmp_path / "out")
    result = veneer(*command)
    assert (result.exit_code, "4 modules changed" in result.stdout) == (0, True), result.output
    options = ("-p", "hi", "--max-new-tokens", 11)
    merged, adapted = veneer("generate", tmp_path / "out", *options), veneer("generate", adapter_folder, *options)
    assert merged.stdout == adapted.stdout
    for verb in (("generate", *options), ("eval", "-d", tmp_path / "data.txt", "-m", "perplexity")):
        (tmp_path / "data.txt").write_text("a text")
        doubled = veneer(verb[0], tmp_path / "out", "-a", adapter_folder, *verb[1:])
        assert (doubled.exit_code, "would double its change" in doubled.stderr) == (2, True), doubled.output
    again = veneer(*command)
    assert (again.exit_code, "is not empty" in again.stderr) == (2, True)
    assert veneer(*command, "--force", "--dtype", "bfloat16").exit_code == 0
    wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), adapter_folder)
    wanted = wanted.merge_and_unload().to(torch.bfloat16).state_dict()
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in got.items())


def test_what_cannot_be_merged_is_one_message(
    veneer: Veneer, model_folder: Path, adapter_folder: Path, other_adapter: Path, tmp_path: Path
) -> None:
    cases = {
        (model_folder, tmp_path / "nowhere"): "there is no such folder",
        ("./nowhere", adapter_folder): "no such folder or file",
        (model_folder, other_adapter): "does not fit",
        (adapter_folder, adapter_folder): "is an adapter, not a model",
        (model_folder, model_folder): "holds no adapter_config.json",
    }
    for (base, adapter), message in cases.items():
        result = veneer("merge", "--base", base, "--adapter", adapter, "-o", tmp_path / "out")
        assert (result.exit_code, message in result.stderr) == (2, True), result.output
        assert not (tmp_path / "out").exists()


def test_a_pipe_gets_results_alone(
    veneer: Veneer, model_folder: Path, adapter_folder: Path, tmp_path: Path, data: Path
) -> None:
    commands = [
        ("eval", model_folder, "-d", data, "-m", "labels"),
        ("merge", "--base", model_folder, "--adapter", adapter_folder, "-o", tmp_path / "merged"),
        ("merge-models", model_folder, tmp_path / "merged", "-o", tmp_path / "both"),
    ]
    for command in commands:
        result = veneer(*command)
        assert (result.exit_code, result.stderr) == (0, ""), result.output
