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
    """Virtual tokens before the rows of a batch.

    ``counts`` are the numbers of virtual tokens of the active adapters. ``routing`` is None if one adapter acts on all
    rows. Every row has ``width`` positions for them. If its adapter has fewer virtual tokens, these fill the last
    positions, and the others are masked.
    """

    counts: Mapping[str, int]
    routing: Routing | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The active adapters."""
        return tuple(self.counts)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Pairs of active adapter and task that rows name, each once."""
        if self.routing is None:
            return tuple((name, None) for name in self.counts)
        return tuple(choice for choice in self.routing.choices if choice[0] in self.counts)

    @property
    def width(self) -> int:
        """Number of positions for virtual tokens before every row."""
        return max(self.counts.values())

    @property
    def mark(self) -> object:
        """Value that identifies these virtual tokens, put on a cache that starts with them."""
        return self.names[0] if self.routing is None else self.routing

    @property
    def is_even(self) -> bool:
        """Return True if every row fills all positions with virtual tokens."""
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
        """Return which positions hold a virtual token of their row, (rows, width) booleans."""
        return torch.arange(self.width, device=device) >= self.width - self.used(n_rows, device)

    def positions(self, n_rows: int, device: torch.device) -> Tensor:
        """Return the position ids, (rows, width): 0 for a row's first virtual token and for the masked positions before
        it.
        """
        first = self.width - self.used(n_rows, device)
        return (torch.arange(self.width, device=device) - first).clamp_min(0)

    def rows(self, given: Sequence[Tensor], n_rows: int) -> Tensor:
        """Return, for every row, the tensor (n, …) of its choice in ``given``, as (rows, width, …). ``given`` has one
        tensor for each of the `choices`; shorter ones get zeros in front.
        """
        if self.routing is None:
            return given[0].expand(n_rows, *given[0].shape)
        return leading_rows(given, self.routing.chosen(n_rows, self.choices, "the model"), self.width)


def leading_rows(
    given: Sequence[Float[Tensor, "_ *shape"]], row_index: Int[Tensor, " rows"], n: int
) -> Float[Tensor, "rows n *shape"]:
    """Return, for each row, the element of ``given`` with index ``row_index`` (from 1), or zeros if the index is 0.

    Each element is padded with leading zeros to length n along its first axis.
    """
    filled = [torch.cat([x.new_zeros(n - x.shape[0], *x.shape[1:]), x]) for x in given]
    return torch.stack([torch.zeros_like(filled[0]), *filled])[row_index.to(filled[0].device)]
