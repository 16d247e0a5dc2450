"""Results of ``veneer eval``: as a table, as JSON, and row by row in a file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from veneer.cli.facts import print_facts
from veneer.cli.subject import BASE
from veneer.evaluate.accuracy import Accuracy
from veneer.evaluate.confusion import Confusion
from veneer.evaluate.measurement import Result, compare, numbers_of, predictions_of
from veneer.evaluate.metric import Asked
from veneer.evaluate.perplexity import Perplexity
from veneer.evaluate.statistics import Difference

_MOST = 12  # lines of what was confused, where that is no table
_MOST_OF_SEVERAL = 5  # where several results are shown
_MOST_CLASSES = 20  # with a line of their own
_REST = "all classes and what each was taken for: --json; row by row: --predictions FILE"
_GAP = 2  # between two columns
_EDGES = 3  # of a table, and the space after its first column
_SHORT = 16  # of a label that is folded no further for a table beside it


@dataclass(frozen=True)
class Column:
    """Result under the name of an adapter, a model or the base, with the questions that led to it."""

    name: str
    result: Result
    asked: Asked
    tokenizer: Any

    @property
    def adapter(self) -> str | None:
        """Name of the adapter; None for the base."""
        return None if self.name == BASE else self.name


@dataclass(frozen=True)
class Measured:
    """Results of one metric, with facts ``about`` the measured model and data."""

    metric: str
    columns: Sequence[Column]
    about: Mapping[str, str | None]
    seconds: float

    @property
    def results(self) -> list[Result]:
        """Result of each column."""
        return [column.result for column in self.columns]

    @property
    def is_share(self) -> bool:
        """Return True if the metric is an accuracy, a share of right answers."""
        return isinstance(self.results[0], Accuracy)

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return [column.name for column in self.columns]

    def differences(self) -> list[Difference]:
        """Compare the result of each column after the first with that of the first, row by row."""
        first, *others = self.results
        return [compare(first, each) for each in others]

    def facts(self) -> dict[str, Any]:
        """Return all facts, for JSON. Several columns are a list under ``results``, in their order, with their
        ``differences``.
        """
        head = {**self.about, "metric": self.metric}
        told = [numbers_of(result) for result in self.results]
        if len(told) == 1:
            return {**head, **told[0], "seconds": self.seconds}
        named = [{"adapter": c.adapter, **each} for c, each in zip(self.columns, told, strict=True)]
        compared = [
            {"first": self.names[0], "second": name, **asdict(each)}
            for name, each in zip(self.names[1:], self.differences(), strict=True)
        ]
        return {**head, "results": named, "differences": compared, "seconds": self.seconds}

    def show(self) -> None:
        """Print the results as tables."""
        facts = {name: value for name, value in self.about.items() if value is not None}
        if len(self.results) == 1:
            print_facts({**facts, **self._shown(self.results[0]), "seconds": f"{self.seconds:,.4g}"})
        else:
            facts.pop("adapter", None)
            print_facts({**facts, "metric": self.metric, "seconds": f"{self.seconds:,.4g}"})
            self._show_side_by_side()
        confusions = [(column, getattr(column.result, "confusion", None)) for column in self.columns]
        for column, confusion in confusions:
            if confusion is not None:
                _show_classes(confusion, column.name if len(confusions) > 1 else "")
        if confusions[0][1] is not None and (len(confusions) > 1 or len(confusions[0][1].labels) > _MOST_CLASSES):
            Console().print(_REST, style="dim", highlight=False)

    def _shown(self, result: Result) -> dict[str, str]:
        if not self.is_share:
            one = cast(Perplexity, result)
            return {
                "perplexity": f"{one.value:,.4f}",
                "nats per token": f"{one.nats_per_token:,.4g}",
                "tokens": f"{one.n_tokens:,}",
                "rows": f"{one.n_rows:,}",
            }
        share = cast(Accuracy, result)
        labels = {} if share.confusion is None else {"labels": _first_of(share.confusion.labels)}
        low, high = share.interval
        return {
            f"accuracy ({self.metric})": f"{share.value:.1%} (95%: {low:.1%} to {high:.1%})",
            "right": f"{share.n_right:,} of {share.n_rows:,}",
            **labels,
        }

    def _show_side_by_side(self) -> None:
        what = "accuracy" if self.is_share else "perplexity"
        rows = []
        for name, result in zip(self.names, self.results, strict=True):
            if self.is_share:
                low, high = cast(Accuracy, result).interval
                rows.append((name, f"{result.value:.1%}", f"{low:.1%} to {high:.1%}"))
            else:
                rows.append((name, f"{result.value:,.4f}", f"{cast(Perplexity, result).nats_per_token:.4f}"))
        heads = ("adapter", what, "95%" if self.is_share else "nats per token")
        _show_named(f"{what}, {self.results[0].n_rows:,} rows", heads, rows)
        differences = self.differences()
        alone = ("only\nfirst\nright", "only\nthis\nright") if self.is_share else ()
        compared = []
        for name, each in zip(self.names[1:], differences, strict=True):
            counts = (str(each.only_first), str(each.only_second)) if self.is_share else ()
            written = _points if self.is_share else _nats
            span = " to ".join(map(written, each.interval))
            compared.append((name, written(each.value), span, _p_value(each.p_value), *counts))
        heads = ("adapter", "points" if self.is_share else "nats per token", "95%", "p", *alone)
        _show_named(f"difference from {self.names[0]} ({differences[0].test})", heads, compared)

    def write_predictions(self, path: Path) -> None:
        """Write one JSON object for each row and column: prompt, right answers, prediction, and if it is right."""
        with path.open("w", encoding="utf-8") as file:
            for column in self.columns:
                named = {"adapter": column.adapter} if len(self.columns) > 1 else {}
                for row in predictions_of(column.asked, column.result, column.tokenizer):
                    row = {"row": row["row"], **named, **row}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _show_classes(confusion: Confusion, name: str) -> None:
    """Print counts, recall and precision of each class, then how often rows of one class were predicted as another.

    If there are many classes, only those with the most wrong rows are shown. With a ``name``, this is one of several
    result columns, and only its most frequent confusions are shown.
    """
    console = Console()
    if name:
        if _confused(confusion):
            console.print(Text(f"most confused: {name}", style="bold"))
        _show_most_confused(confusion, _MOST_OF_SEVERAL)
        return
    labels = confusion.labels
    wrong = [at for at in range(len(labels)) if confusion.n_right(at) < confusion.n_rows(at)]
    shown = sorted(wrong, key=lambda at: confusion.n_right(at) - confusion.n_rows(at))[:_MOST_CLASSES]
    few = len(labels) <= _MOST_CLASSES
    table = _table("by class" if few else f"the {len(shown)} of {len(labels)} classes with most wrong rows", "class")
    for column in ("rows", "right", "recall", "predicted", "precision"):
        table.add_column(column, justify="right", no_wrap=True)
    for at in range(len(labels)) if few else shown:
        n, given, right = confusion.n_rows(at), confusion.n_predicted(at), confusion.n_right(at)
        table.add_row(labels[at], str(n), str(right), _ratio(right, n), str(given), _ratio(right, given))
    if few or shown:
        console.print(table)
    if not few or not _show_taken_for(confusion, console):
        _show_most_confused(confusion, _MOST)


def _show_taken_for(confusion: Confusion, console: Console) -> bool:
    """Print the confusion table, with numbered columns if names are too wide. Return False if numbers are too wide as
    well.
    """
    labels, digits = confusion.labels, len(str(max(map(max, confusion.counts))))
    numbers = [str(number) for number in range(1, len(labels) + 1)]
    room = console.width - min(max(map(len, labels)), _SHORT) - 2 * _GAP
    numbered = sum(max(len(head), digits) + _GAP for head in labels) > room
    heads = numbers if numbered else labels
    if sum(max(len(head), digits) + _GAP for head in heads) > room - numbered * (len(numbers[-1]) + 1):
        return False
    table = _table("what each class was taken for", "class")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for number, label, counts in zip(numbers, labels, confusion.counts, strict=True):
        table.add_row(f"{number} {label}" if numbered else label, *map(str, counts))
    console.print(table)
    return True


def _table(title: str, first: str) -> Table:
    """Create a table whose first column holds names, which are shortened if a row is too long."""
    table = Table(box=box.SIMPLE, padding=(0, _GAP - 1, 0, 0), title=Text(title))
    table.add_column(first, overflow="fold")
    return table


def _show_named(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of numbers by name. A name that is too long is broken after a slash if it has one."""
    console, table = Console(), _table(title, heads[0])
    for head in heads[1:]:
        table.add_column(head, justify="right", no_wrap=True)
    taken = sum(
        max(len(line) for cell in column for line in cell.splitlines()) + _GAP
        for column in list(zip(heads, *rows, strict=True))[1:]
    )
    for name, *cells in rows:
        table.add_row(Text(_broken(name, console.width - taken - _EDGES)), *cells)
    console.print(table)


def _broken(path: str, width: int) -> str:
    lines = [""]
    for part in re.findall(r"[^/]*/+|[^/]+", path):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _confused(confusion: Confusion) -> list[tuple[int, str, str]]:
    """Return (count, class, class it was taken for) for each pair of classes that was confused."""
    return [
        (n, own, given)
        for own, row in zip(confusion.labels, confusion.counts, strict=True)
        for given, n in zip(confusion.labels, row, strict=True)
        if own != given and n
    ]


def _show_most_confused(confusion: Confusion, most: int) -> None:
    pairs = _confused(confusion)
    for n, own, given in sorted(pairs, key=lambda pair: -pair[0])[:most]:
        Console().print(f"{n} of {own!r} taken for {given!r}", highlight=False, markup=False)
    if len(pairs) > most:
        Console().print(f"and {len(pairs) - most:,} rarer ones", highlight=False)


def _first_of(labels: Sequence[str]) -> str:
    more = len(labels) - _MOST_CLASSES
    return ", ".join(labels[:_MOST_CLASSES]) + (f" and {more} more" if more > 0 else "")


def _ratio(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _nats(value: float) -> str:
    return f"{value:+.4f}"


def _p_value(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"
