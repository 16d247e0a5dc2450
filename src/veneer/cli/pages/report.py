"""``veneer report``: a page of a run that learned from answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.work import verb
from veneer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Write a page with the curves of a run of grpo, rloo or best_of, and answers to read: RUN/report.html.

    Example: veneer report runs/grpo --answers 20
    """

    run: Annotated[Path, typer.Argument(metavar="RUN", show_default=False, help="The output folder of a run.")]
    answers: Annotated[
        int, typer.Option("--answers", metavar="N", help="Show the N best, the N worst, and N at random.")
    ] = 8

    def __post_init__(self) -> None:
        if not self.run.is_dir():
            raise ConfigError(f"{self.run} is no folder: give the output folder of a run")
        if self.answers < 1:
            raise ConfigError(f"--answers {self.answers} must be at least 1")


report = verb(ReportArguments, "veneer.cli.rollouts.samples", "show_report")
