"""``veneer sweep``: train the members of a recipe with a ``sweep`` part, as ``veneer train`` does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli import train
from veneer.cli.pages.options import unset
from veneer.errors import ConfigError
from veneer.recipe.sweep_part import PART
from veneer.recipe.values import read_values

_Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", show_default=False, help="A YAML file with a sweep part.")]
_On = Annotated[
    str | None,
    unset(
        "PLACE",
        "Train the members on Ray: ray, ray:N (N workers), ray:M-N (M to N) or ray://host:port.",
        "--on",
    ),
]


def sweep(
    context: typer.Context,
    recipe: _Recipe,
    overrides: train.Overrides = None,
    resume: train.MaybeResume = None,
    allow_changes: train.AllowChanges = False,
    on: _On = None,
) -> None:
    """Train the members of a sweep over one base, in this process or on the workers of a Ray cluster.

    Example: veneer sweep sweep.yaml --on ray --resume auto
    """
    if PART not in read_values(recipe, overrides or []):
        raise ConfigError(f"{recipe} has no sweep part: add one, or start the run with `veneer train`.")
    train.train(context, recipe, overrides, resume=resume, allow_changes=allow_changes, on=on)
