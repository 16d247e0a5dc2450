"""Implementation of ``veneer samples`` and ``veneer report``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from veneer.cli.pages.report import ReportArguments
from veneer.cli.pages.samples import SamplesArguments
from veneer.errors import DataError
from veneer.learn.journal import Line, read_journal
from veneer.learn.report import write_run_page

_SHOWN = 20


def show_samples(args: SamplesArguments) -> None:
    """Print rollouts of a run. Raises FormatError without a journal, and DataError if no rollout matches the options
    given.
    """
    chosen = itertools.islice(_chosen(args), args.limit if args.limit or args.as_rows or args.as_json else _SHOWN)
    console, is_any = Console(soft_wrap=True, highlight=False), False
    for line in chosen:
        is_any = True
        if args.as_json:
            typer.echo(json.dumps(line, ensure_ascii=False))
        elif args.as_rows:
            typer.echo(json.dumps({key: line[key] for key in ("prompt", "completion")}, ensure_ascii=False))
        else:
            console.print(shown(line))
    if not is_any:
        raise DataError(f"no rollout in {args.run} matches --step and --below: leave one of them out")


def show_report(args: ReportArguments) -> None:
    """Write the page of a run and print its path. Raises FormatError for a folder with neither a log nor a journal."""
    typer.echo(f"written: {write_run_page(args.run, args.answers)}")


def _chosen(args: SamplesArguments) -> Iterator[Line]:
    for line in read_journal(args.run):
        is_asked = args.step is None or line["step"] == args.step
        reward = line["reward"]  # None: no reward function had an opinion
        if is_asked and (args.below is None or (reward is not None and reward < args.below)):
            yield line


def shown(line: Line) -> Text:
    """Return a rollout as text: a line of numbers, then the messages of its prompt and of its completion."""
    parts = [f"{name} {_number(value)}" for name, value in zip(line["functions"], line["rewards"], strict=True)]
    facts = [
        f"step {line['step']}, row {line['row']}",
        f"reward {_number(line['reward'])}" + (f" ({', '.join(parts)})" if len(parts) > 1 else ""),
        f"advantage {line['advantage']:+.3g}",
        f"{len(line['ids'])} tokens, {line['finish']}",
    ]
    if line["calls"]:
        facts.append(f"{line['calls']} calls, {line['failures']} failed")
    text = Text(" · ".join(facts) + "\n", style="bold")
    for role, said in [*_said(line["prompt"], "prompt"), *_said(line["completion"], "completion")]:
        text.append(f"{role}: ", style="cyan").append(f"{said}\n", style="dim" if role == "tool" else "")
    return text


def _said(messages: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(messages, str):
        yield name, messages
        return
    for each in messages:
        calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in each.get("tool_calls") or []]
        yield each.get("role", name), " ".join([str(each.get("content") or ""), *calls]).strip()


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"
