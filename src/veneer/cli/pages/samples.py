"""``veneer samples``: the answers that a run learned from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.pages.options import unset
from veneer.cli.work import verb
from veneer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SamplesArguments:
    """Show the rollouts of a run of grpo, rloo or best_of, with their rewards.

    Example: veneer samples runs/grpo --step 40 --below 0.2
    """

    run: Annotated[Path, typer.Argument(metavar="RUN", show_default=False, help="The output folder of a run.")]
    step: Annotated[int | None, unset("N", "Show those that were drawn after N steps. Default: all.")] = None
    below: Annotated[float | None, unset("X", "Show those with a reward below X.")] = None
    limit: Annotated[int | None, unset("N", "Show at most N. Default: 20, and all with --as-rows or --json.")] = None
    as_rows: Annotated[
        bool, typer.Option("--as-rows", help="Print rows of prompt and completion, as `veneer train` reads them.")
    ] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print the lines of the journal.")] = False

    def __post_init__(self) -> None:
        if not self.run.is_dir():
            raise ConfigError(f"{self.run} is no folder: give the output folder of a run")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit {self.limit} must be at least 1")
        if self.as_rows and self.as_json:
            raise ConfigError("--as-rows and --json are two forms of the same: give one of them")


samples = verb(SamplesArguments, "veneer.cli.rollouts.samples", "show_samples")
