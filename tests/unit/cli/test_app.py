"""The program around the verbs: help, version, exit codes and messages."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from veneer.cli import app as app_module
from veneer.cli.app import VerbGroup, app
from veneer.errors import ConfigError
from veneer.plain.units import count
from veneer.recipe.recipe import Recipe

RUNNER = CliRunner()


def failing(error: BaseException) -> typer.Typer:
    """A program like veneer's whose one verb raises."""
    program = typer.Typer(cls=VerbGroup, pretty_exceptions_enable=False)

    @program.callback()
    def root() -> None: ...

    @program.command("fail")
    def fail() -> None:
        raise error

    return program


def test_a_user_error_is_one_message_on_stderr_and_exit_code_2() -> None:
    result = RUNNER.invoke(failing(ConfigError("r is -1; allowed: 1 or more [note]")), ["fail"])
    assert result.exit_code == 2
    assert result.stderr == "error: r is -1; allowed: 1 or more [note]\n"
    assert result.stdout == ""


def test_an_interrupt_exits_with_130() -> None:
    result = RUNNER.invoke(failing(KeyboardInterrupt()), ["fail"])
    assert result.exit_code == 130
    assert "Traceback" not in result.output


@pytest.mark.usefixtures("known_machine")
def test_an_interrupt_may_say_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted_after(checkpoints: list[str]) -> Callable[..., None]:
        def run(recipe: Recipe, **_: object) -> None:
            for checkpoint in checkpoints:
                (Path(recipe.output) / checkpoint).mkdir(parents=True)
                (Path(recipe.output) / checkpoint / "trainer_state.json").write_text("{}")
            raise KeyboardInterrupt

        return run

    recipe = tmp_path / "recipe.yaml"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    (tmp_path / "m").mkdir()
    recipe.write_text(f"{{model: {{source: {tmp_path / 'm'}}}, data: {{train: {rows}}}, output: {tmp_path / 'run'}}}")
    monkeypatch.setattr("veneer.cli.train_run.run_recipe", interrupted_after([]))
    result = RUNNER.invoke(app, ["train", str(recipe)])
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    monkeypatch.setattr("veneer.cli.train_run.run_recipe", interrupted_after(["checkpoint-5"]))
    result = RUNNER.invoke(app, ["train", str(recipe)])
    kept, base = tmp_path / "run" / "checkpoint-5", tmp_path / "m"
    assert result.stderr == (
        "interrupted: checkpoints are kept, and the same command with --resume goes on from the last one. "
        f"The adapter in {kept} can be used now: `veneer generate {base} --adapter {kept} --raw -p TEXT`, "
        f"`veneer serve {base} --adapters {tmp_path / 'run'}`, `veneer eval {kept} -d FILE -m perplexity`\n"
    )
    assert result.exit_code == 130
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    result = RUNNER.invoke(app, ["train", str(recipe), "--set", f"output={tmp_path / 'next'}"])
    assert f"`veneer chat {base} --adapter {tmp_path / 'next' / 'checkpoint-5'}`" in result.stderr


def test_a_closed_pipe_is_no_traceback() -> None:
    command = [sys.executable, "-c", "from veneer.cli.app import main; main()", "train", "--print-recipe"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the platform has no /dev/full")
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["merge", "--help"], ["train", "--print-recipe"]])
def test_a_full_disk_under_the_output_is_a_message(words: list[str]) -> None:
    command = [sys.executable, "-c", "from veneer.cli.app import main; main()", *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


def test_no_permission_names_the_path() -> None:
    result = RUNNER.invoke(failing(PermissionError(errno.EACCES, "Permission denied", "/x/y")), ["fail"])
    assert (result.exit_code, result.stderr) == (2, "error: Permission denied: /x/y\n")


@pytest.mark.parametrize("error", [RuntimeError("a defect"), OSError(errno.EIO, "bad disk")])
def test_an_unexpected_error_keeps_its_traceback(error: Exception) -> None:
    result = RUNNER.invoke(failing(error), ["fail"])
    assert result.exception is error


def test_help_names_every_verb_and_every_verb_shows_an_example() -> None:
    top = RUNNER.invoke(app, ["--help"], env={"COLUMNS": "200"})
    assert top.exit_code == 0
    for command in app.registered_commands:
        assert command.name is not None
        assert command.name in top.stdout
        shown = RUNNER.invoke(app, [command.name, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0
        assert f"veneer {command.name}" in shown.stdout.split("Example", 1)[1]


def test_an_unknown_verb_is_exit_code_2() -> None:
    result = RUNNER.invoke(app, ["fetsch"])
    assert result.exit_code == 2
    assert "fetsch" in result.stderr


def test_version() -> None:
    result = RUNNER.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("veneer 0.")


def test_env_prints_back_ends_and_the_cache_folder(tmp_path: object) -> None:
    result = RUNNER.invoke(app, ["env", "--json"], env={"VENEER_CACHE": str(tmp_path)})
    facts = json.loads(result.stdout)
    assert facts["cache folder"] == str(tmp_path)
    assert facts["back end reference"] == "available"
    assert facts["torch"][0].isdigit()
    if facts["back end cpu"] == "available":
        instruction_set, _, threads = facts["kernel build"].rpartition(", ")
        assert instruction_set
        assert threads.startswith(f"{count(torch.get_num_threads(), 'thread')} of ")
    else:
        assert facts["kernel build"] == "none: the C++ module was not built"


def test_env_as_a_table_has_a_line_for_every_fact() -> None:
    result = RUNNER.invoke(app, ["env"], env={"COLUMNS": "300"})
    for name in ("veneer", "python", "torch", "cpu features", "threads", "cache folder"):
        assert any(line.split("  ")[0].strip() == name for line in result.stdout.splitlines())


def test_main_is_the_entry_point() -> None:
    assert callable(app_module.main)


def test_help_and_version_come_without_importing_torch() -> None:
    code = "import sys, veneer.cli.app; sys.exit(' '.join({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""
