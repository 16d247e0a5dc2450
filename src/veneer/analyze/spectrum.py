"""Singular values of an update, from its factors: norm, effective rank, energy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.errors import CompositionError
from veneer.records.deltas import LinearDelta
from veneer.records.svd import svd_of_factors


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Update ``scale B A = U diag(s) Vᵀ`` of one layer: u (o, r), s (r,) in descending order, vt (r, i)."""

    u: Float[Tensor, "o r"]
    s: Float[Tensor, " r"]
    vt: Float[Tensor, "r i"]

    @property
    def norm(self) -> float:
        """Frobenius norm of the update."""
        return float(self.s.norm())

    @property
    def rank(self) -> int:
        """Number of singular values above the rounding error of the decomposition: the largest value, times the number
        of values, times eps.

        Source: Golub and Van Loan 2013, "Matrix Computations", sec. 5.4.1 (numerical rank).
        """
        return int((self.s > self.s[:1] * len(self.s) * torch.finfo(self.s.dtype).eps).sum())

    @property
    def effective_rank(self) -> float:
        """Exponential of the entropy of the normalised singular values, between 1 and r; 0 for a zero update.

        Source: Roy and Vetterli 2007, "The effective rank", eq. 4.
        """
        total = float(self.s.sum())
        if total == 0:
            return 0.0
        p = self.s[self.s > 0] / total
        return float((-(p * p.log()).sum()).exp())

    def energy(self, k: int) -> float:
        """Return the share of the squared norm in the k largest singular values; 1 for a zero update."""
        total = float(self.s.square().sum())
        return float(self.s[:k].square().sum()) / total if total else 1.0


def spectrum(record: LinearDelta) -> Spectrum:
    """Return the spectrum of a low-rank record in at least float32.

    Raises CompositionError for a record with any other term.
    """
    if not record.is_low_rank:
        raise CompositionError(
            "the update is not a plain low-rank pair (LoRA, rsLoRA, VeRA), so it has no spectrum without its base "
            "model. Give one of these"
        )
    return Spectrum(*svd_of_factors(record))


def spectrum_of_dense(update: Float[Tensor, "o i"]) -> Spectrum:
    """Return the spectrum of any update, given as a matrix."""
    return Spectrum(*torch.linalg.svd(update, full_matrices=False))
