"""Report of a sweep: a table, ``sweep.json``, and a picture of quality against parameters."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from rich.table import Table

from veneer.errors import TrainingError
from veneer.plain.ticks import ticks_at
from veneer.train.checkpoint import write_json
from veneer.train.sweep.course import STOPPED
from veneer.train.sweep.recipe import Sweep
from veneer.train.sweep.together import reward_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SWEEP_FILE, PICTURE, PAGE = "sweep.json", "pareto.png", "pareto.html"
_WIDEST = 120  # characters of a name below the picture


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one member. Members are compared by ``measure``: the loss, held out if there are held-out rows.

    For a task with rewards it is the negative ``reward``. It is None if the member diverged, failed or was stopped.
    ``best``: the member is on the Pareto front. ``reason``: why the member ended early.
    """

    name: str
    changes: Mapping[str, Any]
    status: str
    steps: int | None
    train_loss: float | None
    eval_loss: float | None
    n_trained: int
    best: bool
    saved: str | None
    reward: float | None = None
    reason: str | None = None

    @property
    def measure(self) -> float | None:
        """Value by which members are compared; lower is better."""
        if self.status == STOPPED:
            return None
        if self.reward is not None:
            return -self.reward
        return self.train_loss if self.eval_loss is None else self.eval_loss

    @property
    def shown(self) -> float:
        """Reward of a member, or its loss if the task has no rewards. It exists only if ``measure`` is not None."""
        return cast(float, self.measure if self.reward is None else self.reward)


def outcomes(sweep: Sweep, records: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    """Return the members' results in their order.

    ``best`` is True for members that no other beats with at most as many trained parameters.
    """
    found = [_outcome(member.name, member.changes, r) for member, r in zip(sweep.members, records, strict=True)]
    front = pareto_front([(each.n_trained, each.measure) for each in found])
    return [Outcome(**{**asdict(each), "best": best}) for each, best in zip(found, front, strict=True)]


def require_finished(found: Sequence[Outcome]) -> None:
    """Raise TrainingError with the reasons of all members whose training failed, if there are any."""
    failed = [f"{each.name} ({each.reason})" for each in found if each.status == "failed"]
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(found)} members failed: {', '.join(failed)}. The others have ended. Mend the "
            "cause, then continue these with --resume"
        )


def pareto_front(points: Sequence[tuple[int, float | None]]) -> list[bool]:
    """Return True for each point on the Pareto front.

    A point is not on it if another point has at most its size and its loss, and less of one of them.
    """
    known = [(size, loss) for size, loss in points if loss is not None]
    return [
        loss is not None and not any(s <= size and other <= loss and (s < size or other < loss) for s, other in known)
        for size, loss in points
    ]


def write_report(sweep: Sweep, found: Sequence[Outcome]) -> None:
    """Write ``sweep.json``, ``pareto.png`` and ``pareto.html`` into the sweep's output."""
    write_json(
        sweep.output / SWEEP_FILE, {"format": 1, "compared_by": quality(found), "members": list(map(asdict, found))}
    )
    figure = pareto_figure(found)
    figure.savefig(sweep.output / PICTURE)
    (sweep.output / PAGE).write_text(_page(figure, found), encoding="utf-8")


def quality(found: Sequence[Outcome]) -> str:
    """Return the name of the displayed loss or reward."""
    held_out = all(each.eval_loss is not None for each in found if each.status == "finished")
    if _is_of_rewards(found):
        return "held-out reward" if held_out else "reward in training (no held-out rows for all)"
    return "held-out loss" if held_out else "training loss (no held-out rows for all)"


def table(found: Sequence[Outcome]) -> Table:
    """Return the table for the terminal; a star marks the members of the Pareto front."""
    of_rewards = _is_of_rewards(found)
    shown = Table(*_headings(of_rewards), box=None, pad_edge=False)
    for column in shown.columns[1:-1]:
        column.justify = "right"
    for each in sorted(found, key=lambda o: (o.measure is None, o.measure)):
        shown.add_row(*_cells(each, of_rewards), style="bold" if each.best else None)
    return shown


def _is_of_rewards(found: Sequence[Outcome]) -> bool:
    return any(each.reward is not None for each in found)


def _headings(of_rewards: bool) -> tuple[str, ...]:
    return ("member", "parameters", "steps", *(("reward",) if of_rewards else ("training loss", "held-out loss")), "")


def _cells(each: Outcome, of_rewards: bool) -> tuple[str, ...]:
    values = (each.reward,) if of_rewards else (each.train_loss, each.eval_loss)
    losses = ("" if value is None else f"{value:.4f}" for value in values)
    note = each.status if each.status != "finished" else "*" if each.best else ""
    return each.name, f"{each.n_trained:,}", "" if each.steps is None else str(each.steps), *losses, note


def _outcome(name: str, changes: Mapping[str, Any], record: Mapping[str, Any]) -> Outcome:
    results = record.get("results", {})
    return Outcome(
        name=name,
        changes=dict(changes),
        status="stopped early" if results.get("stopped_early") else record["status"],
        steps=results.get("steps"),
        train_loss=results.get("train_loss"),
        eval_loss=results.get("eval_loss"),
        n_trained=record["n_trained"],
        best=False,
        saved=record.get("saved"),
        reward=reward_of(record) if "results" in record else None,
        reason=record.get("reason"),
    )


def pareto_figure(found: Sequence[Outcome]) -> Figure:
    """Return a figure of loss or reward over trained parameters: the front in one colour, joined; the rest in another.

    Points have numbers in the order of the table; the names are printed below the picture.
    """
    # Here, as it takes a second to import: no run waits for it before the first step.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ended = sorted((each for each in found if each.measure is not None), key=lambda each: cast(float, each.measure))
    figure = Figure(figsize=(8, 5 + 0.2 * len(ended)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for best, style, color, label in ((True, "o-", "tab:blue", "Pareto front"), (False, "o", "tab:gray", "beaten")):
        points = sorted((each.n_trained, each.shown) for each in ended if each.best == best)
        if points:
            axes.plot(*zip(*points, strict=True), style, color=color, label=label, drawstyle="steps-post")
    names = []
    for number, each in enumerate(ended, 1):
        point = (each.n_trained, each.shown)
        to_left = number % 2 == 0  # neighbours may lie on each other
        axes.annotate(
            str(number),
            point,
            xytext=(-6 if to_left else 6, 3),
            textcoords="offset points",
            ha="right" if to_left else "left",
        )
        names.append(f"{number}  {each.name}  ({point[1]:.4f})")
    axes.margins(0.08)
    if ended:
        ticks_at(axes, [each.n_trained for each in ended])
        axes.legend(frameon=False)
    axes.set_title("Quality against trained parameters")
    axes.set_xlabel("trained parameters")
    axes.set_ylabel(quality(found))
    axes.grid(alpha=0.3)
    figure.supxlabel("\n".join(map(_cut, names)), x=0.02, ha="left", fontsize=8)
    return figure


def _cut(name: str) -> str:
    """Shorten a name to fit into the picture."""
    return name if len(name) <= _WIDEST else f"{name[: _WIDEST - 1]}…"


def _page(figure: Figure, found: Sequence[Outcome]) -> str:
    """Return a self-contained page: the picture as SVG, and the table."""
    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    svg = picture.getvalue()
    of_rewards = _is_of_rewards(found)
    rows = "".join(
        f"<tr{' class=best' if each.best else ''}>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in (*_cells(each, of_rewards), _told(each.changes)))
        + "</tr>\n"
        for each in sorted(found, key=lambda o: (o.measure is None, o.measure))
    )
    heads = "".join(f"<th>{heading}</th>" for heading in (*_headings(of_rewards), "changes"))
    return _PAGE.format(svg=svg[svg.index("<svg") :], heads=heads, rows=rows)


def _told(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in changes.items())


_PAGE = """<!doctype html>
<meta charset="utf-8"><title>Sweep</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; }}
svg {{ max-width: 100%; height: auto; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .2em .8em; text-align: right; }}
td:first-child, th:first-child, td:last-child, th:last-child {{ text-align: left; }} .best {{ font-weight: bold; }}
</style>
<h1>Quality against trained parameters</h1>
{svg}
<table><tr>{heads}</tr>
{rows}</table>
"""
