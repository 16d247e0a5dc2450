"""Update of a layer as plain factors: its own factors, or the nearest ones of a rank, with their error."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.combine.truncate import rank_of_energy, truncate_dense, truncate_factors, truncate_within
from veneer.combine.update import Update
from veneer.errors import CompositionError
from veneer.records.deltas import LinearDelta
from veneer.records.svd import svd_of_factors


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """Factors in float32 whose product ``B A`` is an update, or the nearest product of their rank.

    ``norm`` is the Frobenius norm of the update, ``error`` that of the difference, relative to it.
    """

    a: Float[Tensor, "r i"]
    b: Float[Tensor, "o r"]
    norm: float
    error: float = 0.0

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return len(self.a)


def plain_of(update: Update, rank: int | None) -> Plain:
    """Return the factors of an update: its own, or the nearest ones of ``rank`` if it is not low-rank or has a higher
    rank.

    Raises CompositionError if the update needs the layer's weight and does not have it, or if it is not low-rank and
    ``rank`` is None.
    """
    if update.is_lowrank:
        a, b = update.record.factors(torch.float32)
        norm = math.sqrt(max(float(((b.double().T @ b.double()) * (a.double() @ a.double().T)).sum()), 0.0))
        most = min(len(a) if rank is None else rank, len(b), a.shape[1])
        if len(a) <= (rank or len(a)):
            return Plain(a=a, b=b, norm=norm)
        kept, error = truncate_factors(LinearDelta.pair(a.double(), b.double()), most)
    elif rank is None:
        raise CompositionError("an update of full rank has no factors of its own: give the rank to keep")
    else:
        whole = update.dense()
        norm = float(whole.double().norm())
        kept, error = truncate_dense(whole, min(rank, *whole.shape))
    a, b = kept.factors(torch.float32)
    return Plain(a=a, b=b, norm=norm, error=error)


def plain_within(update: Update, error: float) -> Plain:
    """Return the factors of the smallest rank whose relative Frobenius error is at most ``error``.

    Raises CompositionError if the update needs the layer's weight and does not have it.
    """
    if update.is_lowrank:
        a, b = update.record.factors(torch.float64)
        return plain_of(update, rank_of_energy(svd_of_factors(LinearDelta.pair(a, b))[1].square(), error))
    whole = update.dense()
    kept, lost = truncate_within(whole, error)
    a, b = kept.factors(torch.float32)
    return Plain(a=a, b=b, norm=float(whole.double().norm()), error=lost)


def padded(layer: Plain, rank: int) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
    """Pad the factors with zeros to a rank; their product stays the same."""
    n = rank - layer.rank
    a, b = torch.nn.functional.pad(layer.a, (0, 0, 0, n)), torch.nn.functional.pad(layer.b, (0, n))
    return a.contiguous(), b.contiguous()


def whole_error(layers: Iterable[Plain]) -> float:
    """Return the relative Frobenius error of all layers together, from each layer's norm and error."""
    pairs = [(layer.error * layer.norm, layer.norm) for layer in layers]
    lost, total = (math.hypot(*(pair[which] for pair in pairs)) for which in (0, 1))
    return lost / total if total > 0 else 0.0
