"""``veneer intrinsic``: the intrinsic dimension of a task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.arguments import require_folder, require_model, require_rows
from veneer.cli.pages import options
from veneer.cli.pages.options import unset
from veneer.cli.work import verb
from veneer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class IntrinsicArguments:
    """Train in random subspaces of all weights and find d90: the fewest dimensions that reach 90% of full training.

    The completions are labels. Accuracy is the share of rows whose right label is the likeliest.

    Example: veneer intrinsic smollm2-135m-instruct -d sst2.jsonl --dims 100,300 -o d90
    """

    model: options.Model
    data: Annotated[Path, unset("FILE", "Rows of prompt and completion.", "--data", "-d")]
    output: Annotated[Path, unset("FOLDER", "Folder for the curve.", "--output", "-o")]
    dims: Annotated[str, typer.Option(metavar="N,...", help="Dimensions to try, with commas.")] = "10,30,100,300,1000"
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Optimizer steps of each point.")] = 100
    learning_rate: Annotated[float, typer.Option(metavar="X", help="The same for every dimension.")] = 1e-3
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Rows in a step.")] = 16
    held_out: Annotated[float, typer.Option(metavar="X", min=0.01, max=0.9, help="Share of rows to score on.")] = 0.3
    structure_aware: Annotated[bool, typer.Option("--structure-aware", help="One dimension scales each layer.")] = False
    seed: Annotated[int, typer.Option(metavar="N", help="Of the subspaces and of the order of rows.")] = 0

    def __post_init__(self) -> None:
        require_folder("--output", self.output)
        require_dimensions(self.dims)
        require_rows(self.data)
        require_model(self.model)

    @property
    def dimensions(self) -> list[int]:
        """Dimensions to try."""
        return [int(d) for d in self.dims.split(",")]


def require_dimensions(dims: str) -> None:
    """Raise ConfigError unless ``--dims`` has whole numbers of at least 1, with commas between them."""
    try:
        smallest = min(int(d) for d in dims.split(","))
    except ValueError as error:
        raise ConfigError(f"--dims {dims!r} must be whole numbers with commas between them") from error
    if smallest < 1:
        raise ConfigError(f"--dims {dims!r} must be 1 or more")


intrinsic = verb(IntrinsicArguments, "veneer.cli.intrinsic", "intrinsic")
