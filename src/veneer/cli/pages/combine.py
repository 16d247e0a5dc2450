"""``veneer combine``: one adapter from several, on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.arguments import require_bases, require_model, require_one_kind, weights_of
from veneer.cli.pages.options import unset
from veneer.cli.work import verb
from veneer.errors import ConfigError
from veneer.store.adapter.folder import require_adapter, require_whole

_Weights = Annotated[str | None, unset("X...", "One weight for each adapter, such as 0.7 -0.3. Default: 1 each.")]
_How = Annotated[
    str,
    typer.Option(metavar="NAME", help="linear, cat, svd, ties, dare_linear, dare_ties, magnitude_prune or factorwise."),
]
_Base = Annotated[
    str | None,
    unset("MODEL", "Base model of adapters that depend on it (DoRA, IA3, OFT). Default: the one that they name."),
]


@dataclass(frozen=True, kw_only=True)
class CombineArguments:
    """Combine adapters of one base into a new one. The inputs are not changed.

    "linear" is the weighted sum. For LoRA it is exact, with ranks added up; --rank reduces the rank, and the error is
    printed. With DoRA the sum has full rank: without --rank, an error above 10% is refused, and the message names a
    sufficient rank.

    Example: veneer combine runs/a runs/b --weights 0.7 0.3 --rank 16 -o runs/both
    """

    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", show_default=False, help="Adapter folders.")]
    output: Annotated[Path, unset("FOLDER", "Folder to write.", "--output", "-o")]
    weights: _Weights = None
    how: _How = "linear"
    density: Annotated[float | None, unset("X", "Share of entries to keep, for ties, dare_* and pruning.")] = None
    rank: Annotated[int | None, unset("N", "Bring the result to this rank.")] = None
    seed: Annotated[int, typer.Option(metavar="N", help="Of the draw that dare_* makes.")] = 0
    base: _Base = None

    def __post_init__(self) -> None:
        for adapter in self.adapters:
            require_adapter(adapter)
        if self.output.exists() and any(self.output.iterdir() if self.output.is_dir() else [self.output]):
            raise ConfigError(f"{self.output} exists and is not empty: choose another folder, nothing is overwritten")
        weights_of(self.weights, len(self.adapters))
        require_model(self.base)
        require_bases(self.adapters, self.base)
        require_whole(*self.adapters)
        require_one_kind(self.adapters)


combine = verb(CombineArguments, "veneer.cli.combine", "combine")
