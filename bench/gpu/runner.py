"""Cases of a run on a rented card: each a process with a time limit, and its result in the file as soon as it ends.

A case prints its figures as JSON objects, one a line, by `figure`. It passes if it ends with 0, and is skipped if it
ends with `SKIPPED`, its last line being the reason.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from bench.serving.engine import process_group

SKIPPED = 3  # exit status
N_LINES, N_CHARACTERS = 20, 2000  # of a failed case's output, kept at most
ENDLESS = "no end in"
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """A command of a stage, with the seconds that it may take. ``name`` is unique."""

    stage: int
    name: str
    command: tuple[str, ...]
    limit: float


@dataclass(frozen=True, slots=True)
class Results:
    """A file with a line of JSON for each case that ended; the last line of a case counts."""

    file: Path

    def rows(self) -> list[Row]:
        """The rows in order. A last line that was cut, as a full disk or a lost machine leaves it, is no row."""
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        found: dict[str, Row] = {}
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[row["case"]] = row
        return list(found.values())

    def append(self, row: Row) -> None:
        """Append a row at once, behind a cut line if there is one."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab+") as file:
            if file.tell() and _last_byte(self.file) != b"\n":
                file.write(b"\n")
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _last_byte(file: Path) -> bytes:
    with file.open("rb") as held:
        held.seek(-1, 2)
        return held.read(1)


def run_all(
    cases: Iterable[Case],
    results: Results,
    *,
    again: Collection[str] = (),
    facts: Mapping[str, Any] | None = None,
    until: float = float("inf"),
    begun: Callable[[Case], None] = lambda case: None,
    ended: Callable[[Row], None] = lambda row: None,
) -> list[Case]:
    """Run the cases that the file does not have, one after the other; return those for which no time was left.

    ``again``: results of which a case is run once more. ``facts`` are in every new row. ``until``: the time by
    ``time.monotonic`` at which the run ends; a case that runs then gets no row.
    """
    done = {row["case"] for row in results.rows() if row["result"] not in again}
    left = []
    for case in cases:
        if case.name in done:
            continue
        seconds = until - time.monotonic()
        if seconds <= 0:
            left.append(case)
            continue
        begun(case)
        row = {**run(case, min(case.limit, seconds)), **(facts or {})}
        if row["result"].startswith(ENDLESS) and seconds < case.limit:
            left.append(case)
            continue
        results.append(row)
        ended(row)
    return left


def run(case: Case, limit: float) -> Row:
    """Run a case and return its row: the result, the seconds and figures, and the last lines unless it passed."""
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        given: Mapping[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        try:
            with process_group(case.command, **given) as process:
                result = _result(process.wait(limit))
        except subprocess.TimeoutExpired:
            result = f"{ENDLESS} {limit:.0f} s"
        except OSError as error:  # a program that is not there
            result = str(error)
        output.seek(0)
        lines = output.read().splitlines()
    row = {"stage": case.stage, "case": case.name, "result": result, "seconds": round(time.monotonic() - begin, 1)}
    row |= {"command": list(case.command), "figures": [found for line in lines if (found := _figures(line))]}
    said = [line for line in lines if not _figures(line)]
    return row if result == "passed" else {**row, "said": "\n".join(said[-N_LINES:])[-N_CHARACTERS:]}


def _result(status: int) -> str:
    """The end of a process in words."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return {0: "passed", SKIPPED: "skipped"}.get(status, "failed")


def _figures(line: str) -> Row:
    """The figures of a line, none if it is text."""
    if not line.startswith('{"what"'):
        return {}
    try:
        return dict(json.loads(line))
    except json.JSONDecodeError:
        return {}


def figure(what: str, **values: float | str) -> None:
    """Print the figures of one thing that a case measures."""
    print(json.dumps({"what": what, **values}, ensure_ascii=False), flush=True)


def skip(reason: str) -> NoReturn:
    """End a case for which this machine lacks something."""
    print(reason, flush=True)
    sys.exit(SKIPPED)


def told(row: Row) -> list[str]:
    """A row for people: the case, its result, and a line for each of its figures."""
    lines = [f"{row['stage']}  {row['case']:32}  {row['result']}, {row['seconds']:.0f} s"]
    for figures in row["figures"]:
        values = [f"{name} {_short(value)}" for name, value in figures.items() if name != "what"]
        lines.append(f"     {figures['what']:40}  {', '.join(values)}")
    if row["result"] != "passed":
        lines += [f"     {line}" for line in row["said"].splitlines()[-1:]]
    return lines


def _short(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def summary(rows: Sequence[Row], left: Sequence[Case]) -> str:
    """One line: the number of cases by their result."""
    counts = [(sum(row["result"] == kind for row in rows), kind) for kind in ("passed", "skipped")]
    wrong = [row["case"] for row in rows if row["result"] not in ("passed", "skipped")]
    parts = [f"{n} {kind}" for n, kind in counts if n]
    parts += [f"{len(wrong)} wrong ({', '.join(wrong)})"] if wrong else []
    parts += [f"{len(left)} not begun, since the time is up"] if left else []
    return "; ".join(parts) or "there is no such case"
