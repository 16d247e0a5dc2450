"""`veneer generate --input`: rows are answered as alone, by their own adapters; errors come before loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from veneer.answer import engine as engine_answering

Veneer = Callable[..., Result]


def one(veneer: Veneer, *command: object) -> str:
    found = veneer("generate", *command, "--max-new-tokens", 7)
    assert found.exit_code == 0, found.output
    return found.stdout.removesuffix("\n")


@pytest.mark.parametrize("engine", [True, False])
def test_rows_are_answered_as_alone(
    veneer: Veneer, model_folder: Path, adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    engine: bool,
) -> None:  # fmt: skip
    if not engine:
        monkeypatch.setattr(engine_answering, "_slow", lambda base: "a test asks for it")
    source, output = tmp_path / "ask.jsonl", tmp_path / "out.jsonl"
    (tmp_path / "mine").symlink_to(adapter_folder)
    turns = [{"role": "user", "content": "three"}, {"role": "assistant", "content": "known"}]
    rows = [
        {"prompt": "one", "id": 1},
        {"prompt": "two", "adapter": "mine"},
        {"messages": turns, "adapter": str(adapter_folder)},
        {"prompt": "four", "adapter": None},
    ]
    source.write_text("\n".join(map(json.dumps, rows)))
    result = veneer("generate", model_folder, "--input", source, "-o", output, "--max-new-tokens", 7)
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "answer"} for row in found] == rows
    wanted = [
        one(veneer, model_folder, "-p", "one"),
        one(veneer, model_folder, "-p", "two", "-a", adapter_folder),
        one(veneer, model_folder, "-p", "three", "-a", adapter_folder),
        one(veneer, model_folder, "-p", "four"),
    ]
    assert [row["answer"] for row in found] == wanted
    assert wanted[0] != one(veneer, model_folder, "-p", "one", "-a", adapter_folder)
    again = veneer("generate", model_folder, "--input", source, "-o", output)
    assert (again.exit_code, "is there already: choose another name, or overwrite it (--force)" in again.stderr) == (
        2,
        True,
    )


def test_templates_lines_and_a_default_adapter(
    veneer: Veneer, model_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "ask.csv").write_text('q,adapter\n"why, then",\nhow,' + str(adapter_folder) + "\n")
    (tmp_path / "ask.txt").write_text("why\n\nhow\n")
    output = tmp_path / "out.jsonl"
    command = ("generate", model_folder, "-o", output, "--raw", "--max-new-tokens", 7, "--force", "-a", adapter_folder)
    assert veneer(*command, "-i", tmp_path / "ask.csv", "-p", "Q: {q}").exit_code == 0
    found = [json.loads(line)["answer"] for line in output.read_text().splitlines()]
    assert found == [
        one(veneer, model_folder, "--raw", "-p", "Q: why, then"),
        one(veneer, model_folder, "--raw", "-p", "Q: how", "-a", adapter_folder),
    ]
    assert veneer(*command, "-i", tmp_path / "ask.txt", "--limit", 1).exit_code == 0
    (row,) = map(json.loads, output.read_text().splitlines())
    assert row == {"prompt": "why", "answer": one(veneer, adapter_folder, "--raw", "-p", "why")}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ('{"prompt": "a"}', ("-o", "out.txt"), "must end in .jsonl"),
        ('{"prompt": "a"}', (), "add --output FILE.jsonl"),
        ('{"prompt": "a"}', ("-o", "ask.jsonl"), "is the input"),
        ('{"prompt": "a"}\n{"prompt": "b", "adapter": "nowhere"}', ("-o", "o.jsonl"), "row 2: no adapter 'nowhere'"),
        ('{"prompt": "a", "adapter": 3}', ("-o", "o.jsonl"), "row 1: the field 'adapter' must name a folder, not 3"),
        ('{"question": "a"}', ("-o", "o.jsonl"), "row 1: its fields are ['question']"),
        ('{"prompt": "a"}', ("-o", "o.jsonl", "-p", "{x}"), "row 1: the template '{x}' asks for the field 'x'"),
        ('{"messages": []}', ("-o", "o.jsonl"), "row 1: messages must be a list that is not empty"),
        (
            '{"messages": [{"role": "assistant", "content": "x"}]}',
            ("-o", "o.jsonl"),
            "row 1: no turn comes before the answer",
        ),
        ("", ("-o", "o.jsonl"), "holds no rows"),
        ("{", ("-o", "o.jsonl"), "row 1: not JSON"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_loaded(
    veneer: Veneer, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: str,
    options: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    def loads(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("veneer.adapters.chosen.load_model", loads)
    Path("ask.jsonl").write_text(rows)
    result = veneer("generate", model_folder, "--input", "ask.jsonl", *options)
    assert (result.exit_code, message in result.stderr) == (2, True), result.output
    for wrong, told in (
        ((), "say what to answer"),
        (("-p", "x", "-o", "o.jsonl"), "belong to --input"),
        (("-p", "x", "-a", "nowhere"), "no adapter 'nowhere'"),
        (("-p", "", "--raw"), "prompt is empty"),
        (("-p", "x", "--raw", "--system", "y"), "--system needs a chat template"),
    ):
        result = veneer("generate", model_folder, *wrong)
        assert (result.exit_code, told in result.stderr) == (2, True), result.output
