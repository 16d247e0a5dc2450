"""Facts by name on stdout: a table of two columns, or JSON on request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def print_facts(facts: Mapping[str, str]) -> None:
    """Print a row for each fact: its name in bold, and its value, wrapped if it is long."""
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    Console().print(table)
