"""Runs without what takes longer than to train a tiny model, for tests that are about something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Replace = Callable[[Any, str, Any], None]


def plan_once(replace: Replace = setattr) -> None:
    """Let the time of a run be that of its longest rows: no second plan, of rows as they are, comes before it."""
    from veneer.plan import report

    replace(report, "own_rows", lambda recipe, batch: None)


def plan_nothing(replace: Replace = setattr) -> None:
    """Let a run begin without a plan, as one that cannot be planned."""
    from veneer.cli import train_run

    replace(train_run, "planned_facts", lambda recipe, tell, *_, **__: (None, "not planned: left out by the test"))


def draw_nothing(replace: Replace = setattr) -> None:
    """Leave the picture of the loss empty."""
    from veneer.train import run

    replace(run, "draw_loss", lambda history, path: path.touch())
