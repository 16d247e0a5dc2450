"""``veneer``: the commands under one program, and its error messages.

Exit codes: 0 done; 2 an error that the user can fix (with one message on stderr, no traceback); 130 interrupted; 143
terminated by SIGTERM. Anything else is a defect of veneer and keeps its traceback.
"""

from __future__ import annotations

import errno
import importlib.metadata
import itertools
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from veneer.cli import plan, sweep, train
from veneer.cli.help import VerbCommand, first_sentence, print_page
from veneer.cli.messages import log_on_stderr
from veneer.cli.pages import (
    add_key,
    chat,
    combine,
    draw,
    env,
    eval,
    export,
    fetch,
    generate,
    info,
    inspect,
    intrinsic,
    merge,
    merge_models,
    report,
    samples,
    serve,
)
from veneer.errors import Interrupted, VeneerError
from veneer.plain.leave import left_at_once
from veneer.plain.refusals import allowed
from veneer.plain.unused_packages import hide_unused

UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # typer's own copy of click's has no public name
USER_ERROR = 2
INTERRUPTED = 130
_ENVIRONMENT = {errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EROFS, errno.EDQUOT}


class VerbGroup(TyperGroup):
    """Group of verbs. It turns errors that a user can fix into a message and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line; ``--weights 0.7 -0.3`` needs no quotes, and ``--resume`` no value."""
        ctx.obj = list(args)  # for a verb that starts itself again
        return super().parse_args(ctx, with_resume_valued(with_weights_joined(args)))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help page of the program: every verb with its first sentence."""
        print_page(self, ctx, [(name, first_sentence(verb)) for name, verb in self.commands.items()])

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the pieces of the usage line, ``COMMAND …``."""
        return ["COMMAND", "[ARGUMENTS]", "[OPTIONS]"]

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        # Where it and PEFT are installed, transformers imports it, and it warns of kernels that nothing here uses.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        log_on_stderr()
        with _messages():
            return super().invoke(ctx)

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Parse the options of the program itself. Errors become messages here too: printing the version or the help
        may fail on a full disk.
        """
        with _messages():
            return super().make_context(*args, **options)


@contextmanager
def _messages() -> Iterator[None]:
    """Turn errors that the user can mend into a message and an exit code."""
    try:
        yield
    except UsageError as error:
        told = _in_one_line(error)
        raise (_told(told) if told else typer.Exit(USER_ERROR)) from error
    except VeneerError as error:
        raise _told(str(error)) from error
    except OSError as error:
        if error.errno not in _ENVIRONMENT:
            raise
        raise _told(f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)) from error
    except RuntimeError as error:
        if "torch" not in sys.modules:
            raise
        from veneer.model.memory.gpu_failure import gpu_failure  # imports torch

        failure = gpu_failure(error)
        if failure is None:
            raise
        raise _told(str(failure)) from error
    except KeyboardInterrupt as error:
        told = f"interrupted: {error}" if error.args else "interrupted"
        _main_stderr().print(told, style="red", highlight=False, soft_wrap=True)
        raise typer.Exit(error.exit_code if isinstance(error, Interrupted) else INTERRUPTED) from error


def _in_one_line(error: Any) -> str:
    """Return the error of a wrong command line, with the usage and the command that shows more help.

    It is empty if a group was called without a subcommand, because the group has then printed its help.
    """
    if not error.format_message():
        return ""
    if isinstance(error, typer.BadParameter):
        error.message = _reason_of(error)
    told = " ".join(str(error.format_message()).removeprefix("Invalid value for ").split()).rstrip(".")
    told = f"{told[:1].lower()}{told[1:]}{'' if told.endswith('?') else '.'}"
    if error.ctx is None:
        return told
    names, at = list[str](), error.ctx
    while at.parent is not None:
        names, at = [at.info_name, *names], at.parent
    command, pieces = " ".join(["veneer", *names]), error.ctx.command.collect_usage_pieces(error.ctx)
    return f"{told} Usage: {' '.join([command, *pieces])}; see `{command} --help`"


def _reason_of(error: Any) -> str:
    """Return the reason why a value is wrong, reworded from pydantic's message."""
    problems = error.__cause__.errors() if isinstance(error.__cause__, ValidationError) else []
    reason = allowed(problems) if problems else ""
    if reason.startswith("must "):
        return f"{problems[0]['input']!s:.40} {reason}"
    return str(error.message).removeprefix("Value error, ")


def with_weights_joined(args: list[str]) -> list[str]:
    """Return the arguments with all numbers after ``--weights`` joined into its one value."""
    if "--weights" not in args:
        return args
    first = args.index("--weights") + 1
    numbers = list(itertools.takewhile(_is_number, args[first:]))
    return [*args[:first], *([" ".join(numbers)] if numbers else []), *args[first + len(numbers) :]]


def with_resume_valued(args: list[str]) -> list[str]:
    """Return the arguments with the value of ``--resume`` joined to it: ``auto`` if that follows, otherwise
    ``last``.
    """
    if "--resume" not in args:
        return args
    at = args.index("--resume")
    auto = args[at + 1 : at + 2] == ["auto"]
    return [*args[:at], f"--resume={'auto' if auto else 'last'}", *args[at + 1 + auto :]]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _main_stderr() -> Console:
    return Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")


def _told(message: str) -> typer.Exit:
    """Print the message and return the exit to raise. Under torchrun only the first process prints."""
    _main_stderr().print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    return typer.Exit(USER_ERROR)


app = typer.Typer(
    name="veneer",
    cls=VerbGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"veneer {importlib.metadata.version('veneer')}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
    ),
) -> None:
    """Fit thin trained sheets (adapters) to a frozen model: train, evaluate, merge, generate.

    Every command explains itself with an example: veneer COMMAND --help
    """


app.command("fetch", cls=VerbCommand)(fetch.fetch)
app.command("train", cls=VerbCommand)(train.train)
app.command("sweep", cls=VerbCommand)(sweep.sweep)
app.command("plan", cls=VerbCommand)(plan.plan)
app.command("info", cls=VerbCommand)(info.info)
app.command("generate", cls=VerbCommand)(generate.generate)
app.command("chat", cls=VerbCommand)(chat.chat)
app.command("serve", cls=VerbCommand)(serve.serve)
app.command("add-key", cls=VerbCommand)(add_key.add_key)
app.command("combine", cls=VerbCommand)(combine.combine)
app.command("inspect", cls=VerbCommand)(inspect.inspect)
app.command("eval", cls=VerbCommand)(eval.eval_)
app.command("merge", cls=VerbCommand)(merge.merge)
app.command("merge-models", cls=VerbCommand)(merge_models.merge_models)
app.add_typer(export.app, name="export")
app.command("draw", cls=VerbCommand)(draw.draw)
app.command("samples", cls=VerbCommand)(samples.samples)
app.command("report", cls=VerbCommand)(report.report)
app.command("intrinsic", cls=VerbCommand)(intrinsic.intrinsic)
app.command("env", cls=VerbCommand)(env.env)


def main() -> None:
    """Run the console entry point."""
    # The bars of other libraries come where something takes long, and go when it is done; read when tqdm is imported.
    os.environ.setdefault("TQDM_DELAY", "2")
    os.environ.setdefault("TQDM_LEAVE", "")
    hide_unused()
    with left_at_once():
        app()
