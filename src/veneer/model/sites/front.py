"""Virtual tokens in front of every row: those of one adapter, or of the adapter that the row names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veneer.model.adapted.routing import Choice, Routing


@dataclass(frozen=True)
class Front:
    """Virtual tokens in front of the rows of a batch.

    ``counts`` are the virtual tokens of each active adapter. ``routing`` is None if one adapter acts on all rows.

    Every row has ``width`` places in front. If its adapter has fewer virtual tokens, they are the last of these places.
    The other places are masked.
    """

    counts: Mapping[str, int]
    routing: Routing | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Adapters that act."""
        return tuple(self.counts)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Adapters that act, each once with each of its tasks that rows name."""
        if self.routing is None:
            return tuple((name, None) for name in self.counts)
        return tuple(choice for choice in self.routing.choices if choice[0] in self.counts)

    @property
    def width(self) -> int:
        """Places in front of every row."""
        return max(self.counts.values())

    @property
    def mark(self) -> object:
        """Mark of a cache that starts with these virtual tokens."""
        return self.names[0] if self.routing is None else self.routing

    @property
    def is_even(self) -> bool:
        """Return True if every row uses all places."""
        return self.routing is None or all(self.counts.get(n, 0) == self.width for n in self.routing.names)

    def used(self, n_rows: int, device: torch.device) -> Tensor:
        """Return the number of virtual tokens of each row, (rows, 1)."""
        names = self.names * n_rows if self.routing is None else self.routing.rows(n_rows, "the model")
        return torch.tensor([self.counts.get(name, 0) for name in names], device=device)[:, None]

    def shift(self, positions: Tensor) -> Tensor:
        """Return the positions (rows or 1, length) of tokens that follow these virtual tokens."""
        if self.routing is None:
            return positions + self.width
        return positions + self.used(max(positions.shape[-2], len(self.routing.names)), positions.device)

    def mask(self, n_rows: int, device: torch.device) -> Tensor:
        """Return the places that each row uses, (rows, width) booleans."""
        return torch.arange(self.width, device=device) >= self.width - self.used(n_rows, device)

    def positions(self, n_rows: int, device: torch.device) -> Tensor:
        """Return the positions of the places, (rows, width): 0 for the first virtual token of a row, and before it."""
        first = self.width - self.used(n_rows, device)
        return (torch.arange(self.width, device=device) - first).clamp_min(0)

    def rows(self, given: Sequence[Tensor], n_rows: int) -> Tensor:
        """Return the values at each row's places, (rows, width, …), given the values of the ``choices``, (n, …)."""
        if self.routing is None:
            return given[0].expand(n_rows, *given[0].shape)
        return leading_rows(given, self.routing.chosen(n_rows, self.choices, "the model"), self.width)


def leading_rows(
    given: Sequence[Float[Tensor, "_ *shape"]], row_index: Int[Tensor, " rows"], n: int
) -> Float[Tensor, "rows n *shape"]:
    """Return for each row one of ``given``, counted from 1; index 0 is all zeros.

    Each is padded with leading zeros to length n along its first axis.
    """
    filled = [torch.cat([x.new_zeros(n - x.shape[0], *x.shape[1:]), x]) for x in given]
    return torch.stack([torch.zeros_like(filled[0]), *filled])[row_index.to(filled[0].device)]
