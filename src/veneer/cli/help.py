"""Help page of a command: usage, summary, an example to copy, arguments and options in two columns."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, cast

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

WIDEST = 100
_MOST = 2**63 - 1
"""The largest number that a size, a count or a seed can be."""
_EXAMPLE = "Example:"


class VerbCommand(TyperCommand):
    """Verb whose help page fits a terminal of 80 columns."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the page."""
        print_page(self, ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options. Raises BadParameter for a number that belongs to no option."""
        rest: list[str] = super().parse_args(ctx, args)
        for param in self.get_params(ctx):
            value = ctx.params.get(param.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise typer.BadParameter(f"{value} must be a finite number", ctx=ctx, param=cast(Any, param))
            if isinstance(value, int) and not -_MOST <= value <= _MOST:
                raise typer.BadParameter(f"{value!s:.40} must be at most {_MOST}", ctx=ctx, param=cast(Any, param))
        return rest

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the pieces of the usage line, ``MODEL --prompt TEXT [OPTIONS]``: required ones first, then
        ``[OPTIONS]``.
        """
        return usage_pieces(self.get_params(ctx))


def print_page(command: Any, ctx: Any, commands: Sequence[tuple[str, str]] = ()) -> None:
    """Print the help page of a command, or of a group with its commands and their first lines, on stdout."""
    console = Console(highlight=False)
    console.width = min(console.width, WIDEST)
    usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    console.print(Text.assemble(("Usage: ", "bold"), usage))
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        console.print()
        _print_paragraph(console, " ".join(paragraph.split()))
    params = command.get_params(ctx)
    arguments = [(_argument(param), _told(param)) for param in params if param.param_type_name == "argument"]
    options = [(_option(param), _told(param)) for param in params if param.param_type_name == "option"]
    for title, rows in (("Commands", commands), ("Arguments", arguments), ("Options", options)):
        if rows:
            console.print()
            console.print(Text(f"{title}:", style="bold"))
            console.print(Padding(_columns(rows), (0, 0, 0, 2), expand=False))


def first_sentence(command: Any) -> str:
    """Return the first sentence of a command's help, for the list of commands."""
    paragraph = " ".join(inspect.cleandoc(command.help or "").split("\n\n")[0].split())
    return paragraph.partition(". ")[0].removesuffix(".")


def usage_pieces(params: Sequence[Any]) -> list[str]:
    """Return the names of arguments and required options, then ``[OPTIONS]``."""
    arguments = [param for param in params if param.param_type_name == "argument"]
    needed = [param for param in params if param.param_type_name == "option" and param.required]
    pieces = [_argument(param) if param.required else f"[{_argument(param)}]" for param in arguments]
    return [*pieces, *(f"{_long(param)} {_value(param)}" for param in needed), "[OPTIONS]"]


def _print_paragraph(console: Console, paragraph: str) -> None:
    if not paragraph.startswith(_EXAMPLE):
        console.print(paragraph)
        return
    console.print(Text(_EXAMPLE, style="bold"))
    # Not wrapped: a terminal breaks it where it must, and what is copied stays one line.
    console.print("  " + paragraph.removeprefix(_EXAMPLE).strip(), soft_wrap=True)


def _columns(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(Text(name), text)
    return table


def _argument(param: Any) -> str:
    """Return an argument's name for the help page: ``MODEL``, or ``ADAPTER...`` if several may be given."""
    name = str(param.metavar or param.name.upper())
    return name if param.nargs == 1 or name.endswith("...") else f"{name}..."


def _option(param: Any) -> str:
    """Return an option in the form ``-d, --data FILE``, with its long names one below the other."""
    short = next((name for name in param.opts if not name.startswith("--")), None)
    names = " / ".join([_long(param), *param.secondary_opts])
    value = "" if param.is_flag else f" {_value(param)}"
    return f"{f'{short}, ' if short else '    '}{names}{value}"


def _long(param: Any) -> str:
    return next(str(name) for name in param.opts if name.startswith("--"))


def _value(param: Any) -> str:
    return str(param.metavar or param.name.upper())


def _told(param: Any) -> str:
    """Return a parameter's help text, with its default."""
    text = str(param.help or "")
    if param.required and param.param_type_name == "option":
        return f"{text} [dim](required)[/dim]"
    shown = param.show_default if isinstance(param.show_default, str) else param.default
    if not param.show_default or getattr(param, "is_flag", False) or shown is None:
        return text
    return f"{text} [dim](default: {shown})[/dim]"
