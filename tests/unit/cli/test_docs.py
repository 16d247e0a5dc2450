"""docs/cli.md and ``--help`` name the same options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from veneer.cli.app import app

PAGE = (Path(__file__).parents[3] / "docs" / "cli.md").read_text(encoding="utf-8")
SECTIONS = dict(zip(*[iter(re.split(r"^## (.+)$", PAGE, flags=re.M)[1:])] * 2, strict=True))
COMMANDS: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
VERBS: dict[str, Any] = {
    f"{name} {inner}".strip(): verb
    for name, command in COMMANDS.items()
    for inner, verb in getattr(command, "commands", {"": command}).items()
}
SHARED = {"--adapter", "--load-in-4bit", "--dtype"}  # said once, under "What MODEL can be"
OTHERS = {"--no-deps", "--lora"}  # pip's and llama-server's


def options(verb: str) -> set[str]:
    return {name for param in VERBS[verb].params for name in (*param.opts, *param.secondary_opts) if name[:2] == "--"}


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_a_section_names_the_options_that_the_verb_has(verb: str) -> None:
    section = SECTIONS[verb]
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", section)) - OTHERS
    assert named - options(verb) == set()
    short = {"--output": "-o", "--data": "-d", "--metric": "-m", "--adapter": "-a", "--prompt": "-p"}
    shown = {name for name in options(verb) if re.search(rf" {short.get(name, name)} ", section)}
    assert options(verb) - named - shown - SHARED - {"--no-normalize"} == set()
    assert re.search(rf"\bveneer {verb}\b", section)


def test_the_table_has_a_row_for_every_verb() -> None:
    rows = re.findall(r"^\| `veneer ((?:export )?[\w-]+)", PAGE, flags=re.M)
    assert sorted(rows) == sorted(VERBS)
    for line in re.findall(r"^\| `veneer .*?`", PAGE, flags=re.M):
        verb = re.findall(r"veneer ((?:export )?[\w-]+)", line)[0]
        known = {name for param in VERBS[verb].params for name in param.opts}
        assert set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", line)) <= known


def test_shared_options_are_said_once() -> None:
    assert all(f"`{name}" in SECTIONS["What MODEL can be"] for name in SHARED)
