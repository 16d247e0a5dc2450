"""Keys and ids of adapters' dropout masks: a key for each call of an adapted layer, and an id for each row.

The key is drawn from torch's random numbers on the CPU (in a sweep, from the member's own). A seed, a resumed state and
a recomputed block therefore give the same key. The ids number the rows of each adapter, and the positions in each row.
A row therefore draws the same mask alone, in any mixed batch, and with any padding after it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from veneer.model.adapted.routing import Routing
from veneer.ops.dropout import Mask

_POSITION_BITS = 32


def masks_of(
    rates: Sequence[float], size: torch.Size, device: torch.device, routing: Routing | None
) -> tuple[Mask | None, ...]:
    """Return a new dropout mask for each rate above 0 and None for each rate of 0, for an input of this size (rows, …,
    features).

    If all rates are 0, the result is empty. In a mixed batch (``routing``), there is a rate for each of the routing's
    `choices`, in their order.
    """
    if not any(rates):
        return ()
    names = None if routing is None else routing.rows(size[0], "dropout")
    ids = _ids(tuple(_counted(size[0], names)), size[1:-1].numel(), device)
    generators = [None] if routing is None else [routing.generators.get(name) for name, _ in routing.choices]
    return tuple(
        Mask(p, drawn_key(generator), ids) if p else None for p, generator in zip(rates, generators, strict=True)
    )


def drawn_key(generator: torch.Generator | None) -> int:
    """Return a random key of 63 bits."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator))


def _counted(n_rows: int, names: Sequence[str] | None) -> list[int]:
    """Number each row among the rows of its adapter."""
    if names is None:
        return list(range(n_rows))
    seen: dict[str, int] = {}
    places = []
    for name in names:
        places.append(seen.get(name, 0))
        seen[name] = places[-1] + 1
    return places


@functools.lru_cache(maxsize=16)  # one step asks for the same ids at every layer
def _ids(places: tuple[int, ...], n_positions: int, device: torch.device) -> Int64[Tensor, " n"]:
    rows = torch.tensor(places, dtype=torch.int64, device=device)[:, None] << _POSITION_BITS
    return (rows + torch.arange(n_positions, device=device)).flatten()
