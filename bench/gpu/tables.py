"""Tables in Markdown of the results of `bench.gpu`: one a stage, with columns for the figures that its rows have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bench.gpu.cases import STAGES
from bench.gpu.runner import Row


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """The lines: for each stage its figures, grouped by their columns, and the cases that gave none."""
    for stage, title in enumerate(STAGES):
        own = [row for row in rows if row["stage"] == stage]
        if not own:
            continue
        yield from (f"### {title[0].upper()}{title[1:]}", "")
        figures = [(row["case"], each) for row in own for each in row["figures"]]
        for columns in dict.fromkeys(map(_columns, figures)):
            yield from _table(columns, [each for each in figures if _columns(each) == columns])
        for row in own:
            if row["result"] != "passed":
                said = row["said"].splitlines()[-1:]
                yield f"- `{row['case']}`: {row['result']}{': ' + said[0] if said else ''}"
        yield ""


def _columns(figure: tuple[str, dict[str, Any]]) -> tuple[str, ...]:
    return tuple(name for name in figure[1] if name != "what")


def _table(columns: tuple[str, ...], figures: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    yield f"| case | what | {' | '.join(name.replace('_', ' ') for name in columns)} |"
    yield f"| --- | --- |{' --- |' * len(columns)}"
    for case, figure in figures:
        yield f"| {case} | {figure['what']} | {' | '.join(_cell(figure[name]) for name in columns)} |"
    yield ""


def _cell(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
