"""A verb's page and its work: one name, one class of arguments; the page's checks come before torch."""

from __future__ import annotations

import importlib
import inspect
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest

from veneer.cli.app import app
from veneer.cli.pages import export
from veneer.cli.pages.eval import MetricName
from veneer.cli.work import verb
from veneer.evaluate.metric import METRICS

from .conftest import told_early

VERBS: dict[str, Callable[..., Any]] = {
    f"{command.callback.__module__}.{command.callback.__name__}": command.callback
    for command in (*app.registered_commands, *export.app.registered_commands)
    if command.callback is not None and command.callback.__module__.startswith("veneer.cli.pages.")
}


@pytest.mark.parametrize("name", VERBS)
def test_the_work_takes_what_the_page_takes(name: str) -> None:
    module, _, function = name.rpartition(".")
    place = inspect.getclosurevars(VERBS[name]).nonlocals["place"]  # of info, one that depends on its arguments
    work = getattr(
        importlib.import_module(place if isinstance(place, str) else module.replace(".pages.", ".")), function
    )
    (arguments,) = (hint for key, hint in get_type_hints(work).items() if key != "return")
    assert arguments.__module__ == module
    assert [each.name for each in fields(arguments)] == list(inspect.signature(VERBS[name]).parameters)
    assert VERBS[name].__doc__ == arguments.__doc__


def test_the_page_of_eval_names_the_metrics() -> None:
    assert [str(metric) for metric in MetricName] == list(METRICS)


@dataclass(frozen=True, kw_only=True)
class Numbered:
    """Count."""

    number: int

    def __post_init__(self) -> None:
        if self.number < 0:
            raise ValueError("negative")


def test_the_checks_of_a_page_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    work, told = ModuleType("of_a_test"), list[Any]()
    monkeypatch.setitem(sys.modules, "of_a_test", work)
    work.count = lambda args: told.append(args)  # type: ignore[attr-defined]
    count = verb(Numbered, "of_a_test", "count")
    count(number=7)
    assert told == [Numbered(number=7)]
    with pytest.raises(ValueError, match="negative"):
        count(number=-7)
    assert len(told) == 1


def test_an_end_by_a_signal_says_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    work, before = ModuleType("of_a_test"), signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(sys.modules, "of_a_test", work)
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        work.count = lambda args, number=number: os.kill(os.getpid(), number)  # type: ignore[attr-defined]
        with pytest.raises(KeyboardInterrupt, match="an unfinished output is removed") as caught:
            verb(Numbered, "of_a_test", "count")(number=7)
        assert getattr(caught.value, "exit_code", 130) == code
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_wrong_command_line_is_told_as_any_error(tmp_path: Path) -> None:
    cases = [
        (["eval", "x", "-m", "lables"], "error: '--metric' / '-m': 'lables' is not one of 'perplexity', 'exact-match'"),
        (
            ["eval", "x", "-m", "lables"],
            "'labels'. Usage: veneer eval [MODEL] --metric NAME [OPTIONS]; see `veneer eval --help`",
        ),
        (["merge", "--bsae", "x"], "error: no such option: --bsae"),
        (["train", "x", "--processes", "0"], "error: '--processes': 0 must be at least 1. Usage: veneer train"),
        (["train", "x", "--processes", "two"], "error: '--processes': two must be a whole number. Usage:"),
        (["generate", "x", "--top-p", "1.5"], "error: '--top-p': 1.5 must be at most 1.0. Usage:"),
        (["serve", "x", "--kv-gib", "inf"], "error: '--kv-gib': inf must be a finite number. Usage:"),
        (["generate", "x", "--seed", "1" + "0" * 30], "must be at most 9223372036854775807. Usage:"),
        (["plan", "llama-3-8b", "--fit", "9" * 400 + "GB"], "is no size: write a number above 0 with MB, GB"),
        (["eval"], "error: missing option '--metric' / '-m'. Choose from"),
        (
            ["traim"],
            "error: no such command 'traim'. Did you mean 'train'? Usage: veneer COMMAND [ARGUMENTS] [OPTIONS]",
        ),
    ]
    for (_, told), (code, said) in zip(cases, told_early([command for command, _ in cases]), strict=True):
        assert (code, told in said) == (2, True), said


def test_what_needs_no_model_is_told_before_torch_is_imported() -> None:
    cases = [
        (["generate", "llama-3-8b", "-p", "x"], "is a preset of `veneer plan`"),
        (["generate", "x"], "say what to answer"),
        (["serve", "x", "--host", "::"], "add --open"),
        (["export", "gguf", "x", "-o", "x"], "must end in .gguf"),
        (["export", "gguf", "x", "-o", "x.gguf", "-t", "Q9"], "type 'Q9' is unknown; allowed: F32, F16"),
        (["export", "ollama", "x", "-o", "new", "-t", "Q9"], "type 'Q9' is unknown; allowed: F32, F16"),
        (["export", "lora", "x", "-o", "x.gguf", "-t", "Q4_K"], "type 'Q4_K' is not for adapters"),
        (["generate", "x", "-p", "x", "-a", "none"], "no adapter 'none': there is no such folder"),
        (["generate", "x", "-i", "none.jsonl", "-o", "x.jsonl"], "there is no file none.jsonl"),
        (["generate", "./none", "-p", "x"], "no model './none': there is no such folder or file"),
        (["chat", "x", "-a", "none"], "no adapter 'none'"),
        (["eval", "x", "-a", "none", "-d", __file__, "-m", "labels"], "no adapter 'none'"),
        (["eval", "x", "-d", "none.jsonl", "-m", "labels"], "there is no file none.jsonl"),
        (["eval", "--recipe", "none.yaml", "-m", "labels"], "the recipe none.yaml cannot be read"),
        (["merge", "--base", "x", "--adapter", "none", "-o", "x"], "no adapter 'none'"),
        (["inspect", "none"], "no adapter 'none'"),
        (["combine", "none", "-o", "x"], "no adapter 'none'"),
        (["intrinsic", "x", "-d", "none.jsonl", "-o", "x"], "there is no file none.jsonl"),
        (["intrinsic", "x", "-d", "none.jsonl", "-o", "x", "--dims", "0,3"], "must be 1 or more"),
    ]
    for (command, told), (code, said) in zip(cases, told_early([command for command, _ in cases]), strict=True):
        assert code == 2, command
        assert told in said


def test_a_misspelt_model_is_told_before_torch_is_imported() -> None:
    name = "smollm2-135m-instuct"
    commands = [
        ["generate", name, "-p", "x"],
        ["chat", name],
        ["serve", name],
        ["info", name],
        ["eval", name, "-d", __file__, "-m", "labels"],
        ["export", "gguf", name, "-o", "x.gguf"],
        ["export", "ollama", name, "-o", "x"],
        ["export", "importance", name, "-d", __file__, "-o", "x.gguf"],
        ["merge-models", name, "x", "-o", "x"],
    ]
    told = f"error: no model '{name}': there is no such folder or file; did you mean 'smollm2-135m-instruct'?"
    assert told_early(commands) == [(2, told)] * len(commands)


def test_what_is_not_overwritten_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    for name in ("a.gguf", "a.jsonl", "a.yaml", "full/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    file, folder, adapter = str(tmp_path / "a.gguf"), str(tmp_path / "full"), str(tmp_path)
    rows = str(tmp_path / "a.jsonl")
    cases = [
        (["export", "gguf", "x", "-o", file], "is there already: choose another name, or overwrite it (--force)"),
        (["export", "lora", adapter, "-o", file], "is there already"),
        (["export", "importance", "x", "-d", file, "-o", file], "is there already"),
        (["export", "ollama", "x", "-o", folder], "is not empty: choose another folder, or overwrite it (--force)"),
        (["merge", "--base", "x", "--adapter", adapter, "-o", folder], "is not empty"),
        (["merge-models", "x", "x", "-o", folder], "is not empty"),
        (["generate", "x", "-i", file, "-o", rows], "is there already: choose another name"),
        (["generate", "x", "-i", rows, "-o", rows, "--force"], "is the input: choose another file"),
        (["plan", "smollm2-135m", "--fit", "2GB", "--write", str(tmp_path / "a.yaml")], "is there already"),
        (["merge", "--force", "--base", "x", "--adapter", adapter, "-o", folder], "no model 'x'"),
        (["export", "gguf", "x", "-o", file, "--dry-run"], "no model 'x'"),
    ]
    for (command, told), (code, said) in zip(cases, told_early([command for command, _ in cases]), strict=True):
        assert code == 2, command
        assert told in said, command
