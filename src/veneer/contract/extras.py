"""Parts of the base that an adapter trains, in addition to its own parameters at its targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from veneer.contract.parameters import Params


@dataclass(frozen=True, kw_only=True)
class Extras:
    """Parts of the base that an adapter trains.

    ``modules`` are trained whole, named by the ends of their paths.

    ``biases`` selects the biases of the base that train too: "none", "all", or those of the layers that are "adapted".
    ``parameters`` are adapted by name if no linear layer holds them: experts stacked in one tensor, a router. ``rows``:
    single rows of tables, by the end of the module's path; None is the input embeddings. ``rows_field`` is the field of
    the config that holds their indices, for messages. ``draws_rows``: they start from random values, not the table's.
    ``keeps_tie``: modules that share the input embeddings' weight are changed alike, so that they still share it. A
    tied head gets the transposed update: ``turned`` returns its parameters.
    """

    modules: tuple[str, ...] = ()
    biases: Literal["none", "all", "adapted"] = "none"
    parameters: tuple[str, ...] = ()
    rows: Mapping[str | None, tuple[int, ...]] = field(default_factory=dict)
    rows_field: str = "trainable_token_indices"
    draws_rows: bool = False
    keeps_tie: bool = False
    turned: Callable[[Params], dict[str, Tensor]] = dict


def not_rows(field: str, rows: Sequence[int]) -> list[str]:
    """Return the problems of ``field``, whose value ``rows`` lists rows of an embedding table by index."""
    found = [] if rows else [f"{field} is empty: name the rows to train, at least one"]
    repeated = sorted({row for row in rows if list(rows).count(row) > 1})
    if repeated or any(row < 0 for row in rows):
        told = f", and has {repeated} more than once" if repeated else ""
        found.append(f"{field}={list(rows)!r} must be different numbers of at least 0{told}")
    return found
