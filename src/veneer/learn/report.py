"""Page about a run that learned from answers: curves of its log, advice on them, and answers of its journal to read.

Torch is not imported here, so that a command can write it quickly.
"""

from __future__ import annotations

import heapq
import html
import io
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.disk.atomic import write_atomically
from veneer.errors import FormatError
from veneer.learn.journal import Line, read_journal
from veneer.plain.units import count
from veneer.train.checkpoint import STATE_FILE, checkpoints
from veneer.train.record.record import record_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "report.html"
Log = Sequence[Mapping[str, Any]]


def write_run_page(run: Path, n: int = 8) -> Path:
    """Write ``report.html`` into a run's folder, and return its path. The page shows the ``n`` best, the ``n`` worst
    and ``n`` random answers.

    The log is read from ``run.json``, or from the newest checkpoint if the run has not ended. Raises FormatError for a
    folder with neither a log nor a journal, and for a damaged file.
    """
    log = log_of(run)
    try:
        chosen = choose(read_journal(run), n)
    except FormatError:
        if not log or any(run.glob("rollouts/*")):
            raise
        chosen = AnswersToRead(n)
    write_atomically(run / PAGE, _page(run.resolve().name, log, chosen).encode())
    return run / PAGE


def log_of(run: Path) -> Log:
    """Return the lines of a run's log, oldest first. The list is empty if nothing was saved yet."""
    record = record_of(run) or {}
    if "log" in record:
        return list(record["log"])
    states = [path / STATE_FILE for path in checkpoints(run)[-1:]]
    return [line for path in states for line in json.loads(path.read_text(encoding="utf-8"))["log_history"]]


@dataclass(slots=True)
class AnswersToRead:
    """Answers of a journal, at most ``n`` of each kind: the ``best`` and the ``worst`` by reward, and ``some`` at
    random.

    The random ones are sorted by step.
    """

    n: int
    best: list[Line] = field(default_factory=list)
    worst: list[Line] = field(default_factory=list)
    some: list[Line] = field(default_factory=list)


def choose(lines: Iterator[Line], n: int) -> AnswersToRead:
    """Select answers to read. Among equal rewards, the latest answers count as best and as worst.

    If the same answer was given to a prompt several times, it counts once. Memory grows with ``n`` alone.
    """
    found, generator = AnswersToRead(n), random.Random(0)
    high, low = list[tuple[float, int, Line]](), list[tuple[float, int, Line]]()
    for number, line in enumerate(lines):
        if len(found.some) < n:
            found.some.append(line)
        elif (place := generator.randrange(number + 1)) < n:
            found.some[place] = line
        if line["reward"] is not None:
            for heap, key in ((high, line["reward"]), (low, -line["reward"])):
                _keep(heap, (key, number, line), n)
    found.best = [line for *_, line in sorted(high, key=lambda each: each[:2], reverse=True)]
    found.worst = [line for *_, line in sorted(low, key=lambda each: each[:2], reverse=True)]
    found.some.sort(key=lambda line: (line["step"], line["row"]))
    return found


def _keep(heap: list[tuple[float, int, Line]], new: tuple[float, int, Line], n: int) -> None:
    """Push an answer to a heap, and remove the lowest answer if the heap then has more than ``n``.

    If the heap holds the same answer to the same prompt with an equal key, the new entry replaces it.
    """

    def is_same(other: tuple[float, int, Line]) -> bool:
        return other[0] == new[0] and all(other[2][key] == new[2][key] for key in ("prompt", "completion"))

    same = next((place for place, other in enumerate(heap) if is_same(other)), None)
    if same is not None:
        heap[same] = new
        heapq.heapify(heap)
        return
    heapq.heappush(heap, new)
    if len(heap) > n:
        heapq.heappop(heap)


@dataclass(frozen=True, slots=True)
class LogCurve:
    """Curve of the values of ``key`` in the log, with a band around it.

    The band goes from the values of ``low`` to those of ``high``, or from ``key`` minus ``spread`` to ``key`` plus
    ``spread``.
    """

    name: str
    key: str
    spread: str | None = None
    low: str | None = None
    high: str | None = None


def panels(log: Log) -> dict[str, list[LogCurve]]:
    """Return the curves of a log, grouped by the titles of their charts. Curves without a value are left out."""
    keys = {key for line in log for key in line}
    functions = sorted(key.split("/")[1] for key in keys if key.startswith("rewards/") and key.endswith("/mean"))
    by_function = [LogCurve(name, f"rewards/{name}/mean", f"rewards/{name}/std") for name in functions]
    by_function += [LogCurve(f"{name}, held out", f"eval_rewards/{name}/mean") for name in functions]
    failed = [LogCurve(f"{name} failed", f"rewards/{name}/failed") for name in functions]
    length = "completions/mean_length", None, "completions/min_length", "completions/max_length"
    found = {
        "reward": [
            LogCurve("training", "reward", "reward_std"), LogCurve("held out", "eval_reward", "eval_reward_std"),
        ],
        "reward by function": by_function if len(functions) > 1 else [],
        "tokens of an answer": [LogCurve("mean, shortest, longest", *length)],
        "share": [
            LogCurve("answers that are cut", "completions/clipped_ratio"),
            LogCurve("groups of equal rewards", "frac_reward_zero_std"),
            LogCurve("tokens whose ratio is clipped", "clip_ratio/region_mean"),
            LogCurve("calls of tools that failed", "tools/failure_frequency"),
            LogCurve("groups left out", "rollouts/reset_failed"),
            *failed,
        ],
        "entropy (nats a token)": [LogCurve("entropy", "entropy")],
        "KL to the reference (nats)": [LogCurve("KL", "kl")],
        "engine and training pass differ (nats)": [
            LogCurve("mean", "rollouts/logprob_difference/mean"), LogCurve("max", "rollouts/logprob_difference/max"),
        ],
        "loss": [LogCurve("training", "loss"), LogCurve("held out", "eval_loss")],
    }  # fmt: skip
    there = {title: [curve for curve in curves if curve.key in keys] for title, curves in found.items()}
    return {title: curves for title, curves in there.items() if curves}


def figure_of(log: Log) -> Figure:
    """Return the charts of a log as one figure, two charts a row."""
    # Here, as it takes a second to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    drawn = panels(log)
    rows = -(-len(drawn) // 2)
    figure = Figure(figsize=(11, 2.9 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, curves) in enumerate(drawn.items(), 1):
        axes = figure.add_subplot(rows, 2, place)
        axes.set_title(title, fontsize="medium")
        for curve in curves:
            _draw(axes, curve, log)
        if title == "share":
            axes.set_ylim(-0.03, 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        if len(curves) > 1 or curves[0].low:
            axes.legend(frameon=False, fontsize="small")
        if place > len(drawn) - 2:
            axes.set_xlabel("optimizer step")
    return figure


def _draw(axes: Any, curve: LogCurve, log: Log) -> None:
    lines = [line for line in log if line.get(curve.key) is not None]
    steps, values = [line["step"] for line in lines], [line[curve.key] for line in lines]
    [drawn] = axes.plot(steps, values, "-" if len(steps) > 1 else "o", label=curve.name, linewidth=1.5, markersize=4)
    if curve.spread is not None:
        half = [line.get(curve.spread) or 0.0 for line in lines]
        low, high = ([v + sign * h for v, h in zip(values, half, strict=True)] for sign in (-1, 1))
    elif curve.low is not None and curve.high is not None:
        low, high = ([line.get(key, line[curve.key]) for line in lines] for key in (curve.low, curve.high))
    else:
        return
    axes.fill_between(steps, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)


def remarks(log: Log) -> list[str]:
    """Return a sentence of advice for each sign of trouble in a log.

    Signs are answers that grow without more reward, cut answers, groups of equal rewards, failed calls of tools, and
    low entropy.
    """
    found = []

    def ends(key: str) -> tuple[float, float] | None:
        values = [line[key] for line in log if line.get(key) is not None]
        n = max(1, len(values) // 4)
        return (sum(values[:n]) / n, sum(values[-n:]) / n) if len(values) > 1 else None

    reward, length = ends("reward"), ends("completions/mean_length")
    if reward and length and length[1] > 1.5 * length[0] and reward[1] <= reward[0]:
        found.append(
            f"Answers grow ({length[0]:.0f} to {length[1]:.0f} tokens) while the reward does not ({reward[0]:.3g} to "
            f"{reward[1]:.3g}): reward an early end, or lower max_completion_length."
        )
    for key, most, told in (
        ("completions/clipped_ratio", 0.5, "of the answers are cut: raise max_completion_length, or reward an end."),
        ("frac_reward_zero_std", 0.8, "of the groups have equal rewards, which teach nothing: end the run if they are "
         "the highest, else raise temperature or num_generations, or give other prompts."),
        ("tools/failure_frequency", 0.5, "of the calls of tools fail: show one in the prompt, or reward a good call."),
    ):  # fmt: skip
        if (share := ends(key)) and share[1] > most:
            found.append(f"{share[1]:.0%} {told}")
    if (entropy := ends("entropy")) and entropy[1] < min(0.05, entropy[0] / 2):
        found.append(
            f"Entropy fell from {entropy[0]:.2f} to {entropy[1]:.2f} nats: raise temperature or beta, or lower the "
            "learning rate."
        )
    return found


def _page(name: str, log: Log, chosen: AnswersToRead) -> str:
    picture = io.StringIO()
    if log and panels(log):
        figure_of(log).savefig(picture, format="svg")
    svg = picture.getvalue()
    told = "".join(f"<li>{html.escape(each)}</li>" for each in remarks(log))
    tables = [
        _table(title, lines)
        for title, lines in (("Best", chosen.best), ("Worst", chosen.worst), ("At random", chosen.some))
    ]
    return _PAGE.format(
        name=html.escape(name), svg=svg[svg.find("<svg") :] if svg else "<p>No log is saved yet.</p>",
        remarks=f"<ul class=remarks>{told}</ul>" if told else "", tables="".join(tables),
    )  # fmt: skip


def _table(title: str, lines: Sequence[Line]) -> str:
    if not lines:
        return ""
    cells = [(_facts(line), _said(line["prompt"]), _said(line["completion"])) for line in lines]
    rows = "".join(
        f"<tr><td class=facts>{facts}</td><td>{asked}</td><td>{said}</td></tr>\n" for facts, asked, said in cells
    )
    heads = "<tr><th>reward</th><th>prompt</th><th>answer</th></tr>"
    return f"<h2>{title}</h2>\n<table>{heads}\n{rows}</table>\n"


def _facts(line: Line) -> str:
    parts = [f"<b>{_number(line['reward'])}</b>"]
    if len(line["functions"]) > 1:
        named = zip(line["functions"], line["rewards"], strict=True)
        parts += [f"{html.escape(str(name))} {_number(value)}" for name, value in named]
    parts += [f"advantage {line['advantage']:+.2f}", f"step {line['step']}, row {line['row']}"]
    end = "cut" if line["finish"] == "length" else str(line["finish"])
    parts.append(f"{len(line['ids'])} tokens, {html.escape(end)}")
    if line["calls"]:
        parts.append(f"{count(line['calls'], 'call')}, {line['failures']} failed")
    return "<br>".join(parts)


def _said(messages: Any) -> str:
    """Return a text, or messages with their roles and tool calls, as HTML."""
    if isinstance(messages, str):
        return f"<pre>{html.escape(messages)}</pre>"
    found = []
    for each in messages:
        role, content = str(each.get("role", "")), each.get("content") or ""
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in each.get("tool_calls") or []]
        said = "".join(f"<pre class=call>{html.escape(call)}</pre>" for call in calls)
        said = (f"<pre>{html.escape(text)}</pre>" if text or not calls else "") + said
        found.append(f"<div class='{'tool' if role == 'tool' else 'own'}'><i>{html.escape(role)}</i>{said}</div>")
    return "".join(found)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{name}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222; }}
svg {{ max-width: 100%; height: auto; }}
table {{ border-collapse: collapse; width: 100%; table-layout: fixed; }}
td, th {{ padding: .4em .8em; text-align: left; vertical-align: top; border-top: 1px solid #ddd; }}
th:first-child {{ width: 11em; }} th:nth-child(2) {{ width: 35%; }} .facts {{ font-size: 13px; color: #555; }}
.facts b {{ font-size: 18px; color: #222; }}
pre {{ font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .3em; }}
i {{ font-size: 12px; color: #777; }} .call {{ font: 13px monospace; background: #eef3fa; padding: .2em .4em; }}
.tool pre {{ color: #777; }} .remarks {{ background: #fff6de; padding: .6em 2em; }}
</style>
<h1>{name}</h1>
{remarks}
{svg}
{tables}
</html>
"""
