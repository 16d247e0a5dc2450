"""Help pages as a person reads them: 80 columns, names that say what a value is, an example to copy."""

import re
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from veneer.cli.app import app
from veneer.cli.help import first_sentence, usage_pieces

GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = {
    name if verb is command else f"{name} {inner}": verb
    for name, command in GROUP.commands.items()
    for inner, verb in {**getattr(command, "commands", {}), "": command}.items()
}
VERBS = sorted(COMMANDS)


def page(*arguments: str, columns: int = 80) -> str:
    result = CliRunner().invoke(app, [*arguments, "--help"], env={"COLUMNS": str(columns), "TERM": "dumb"})
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.parametrize("arguments", [(), *(tuple(verb.split()) for verb in VERBS)])
def test_a_page_fits_80_columns_and_shows_no_python(arguments: tuple[str, ...]) -> None:
    shown = page(*arguments)
    assert max(map(len, shown.splitlines())) <= 80
    assert not re.search(r"<\w+|range|list\[|\{ADAPTER|\.\.\.\.|…|\[bold\]|\x1b", shown)


@pytest.mark.parametrize("verb", VERBS)
def test_every_parameter_has_a_line_and_a_help(verb: str) -> None:
    shown = page(*verb.split())
    for param in COMMANDS[verb].params:
        assert param.help, param.name
        name = next((opt for opt in param.opts if opt.startswith("--")), param.metavar or param.name.upper())
        line = re.search(rf"^  (?:-\w, |    )?{re.escape(name)}(?![\w-]).*$", shown, re.M)
        assert line is not None
        assert param.help.split()[0] in line[0]


def test_a_page_names_values_defaults_and_what_must_be_given() -> None:
    shown = page("eval")
    assert shown.startswith("Usage: veneer eval [MODEL] --metric NAME [OPTIONS]\n")
    assert "-d, --data FILE " in shown
    assert "perplexity, exact-match, regex, labels. (required)" in shown
    assert re.search(r"^      --ignore-case +Case and", shown, re.M)  # a switch takes no value
    assert re.search(r"--batch-size N +Most rows in one forward pass. \(default: 16\)", shown)
    assert "perplexity: window in tokens. (default: 1024)" in shown
    assert "--normalize / --no-normalize  Divide" in page("merge-models")
    assert page("combine").startswith("Usage: veneer combine ADAPTER... --output FOLDER [OPTIONS]\n")
    assert page("inspect").startswith("Usage: veneer inspect ADAPTER [OTHER] [OPTIONS]\n")
    assert re.search(r"^  ADAPTER +An adapter folder\. *$", page("inspect"), re.M)


def test_an_example_is_one_line_however_narrow_the_terminal() -> None:
    lines = page("merge", columns=50).splitlines()
    assert lines[lines.index("Example:") + 1].startswith("  veneer merge --base ")
    assert lines[lines.index("Example:") + 1].endswith(" -o merged")


def test_a_wide_terminal_does_not_stretch_the_page() -> None:
    assert max(map(len, page("eval", columns=250).splitlines())) <= 100


def test_several_values_of_an_argument_without_a_name_are_shown_by_dots() -> None:
    program = typer.Typer()

    @program.command()
    def verb(things: list[str], more: Annotated[list[str] | None, typer.Argument()] = None) -> None:
        """Do it. And more."""

    command: Any = typer.main.get_command(program)
    assert usage_pieces(command.params) == ["THINGS...", "[MORE...]", "[OPTIONS]"]
    assert first_sentence(command) == "Do it"


def test_a_usage_error_shows_the_same_usage() -> None:
    result = CliRunner().invoke(app, ["eval", "model"], env={"COLUMNS": "80"})
    assert result.exit_code == 2
    assert "veneer eval [MODEL] --metric NAME [OPTIONS]" in result.stderr


@pytest.mark.parametrize("group", [[], ["export"]])
def test_a_group_alone_prints_its_help_and_no_error(group: list[str]) -> None:
    result = CliRunner().invoke(app, group)
    assert result.exit_code == 2
    assert "--help" in result.output
    assert "error:" not in result.output
