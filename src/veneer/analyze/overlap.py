"""Comparison of two adapters at one layer: shared directions, and entries of opposite sign."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from veneer.analyze.spectrum import Spectrum
from veneer.errors import ShapeError


def subspace_overlap(first: Spectrum, second: Spectrum, i: int, j: int) -> float:
    """Return ``|V_i V_jᵀ|²_F / min(i, j)`` over the top i and j right singular directions.

    It ranges from 0 (orthogonal) to 1 (one contains the other). Two random subspaces have an expected overlap of
    ``max(i, j) / n_inputs``. Source: Hu et al. 2021, arXiv:2106.09685, section 7.2, eq. 4.
    """
    for name, k, of in (("i", i, first), ("j", j, second)):
        if not 1 <= k <= of.vt.shape[0]:
            raise ShapeError(
                f"{name}={k} directions are asked for, but the update has rank {of.vt.shape[0]}: ask for at most as "
                "many"
            )
    if first.vt.shape[1] != second.vt.shape[1]:
        raise ShapeError(
            f"the adapters read inputs of {first.vt.shape[1]} and {second.vt.shape[1]} features: not the same layer. "
            "Compare layers of one shape"
        )
    product = first.vt[:i] @ second.vt[:j].to(first.vt.dtype).T
    return float(product.square().sum()) / min(i, j)


def sign_conflict(first: Float[Tensor, "o i"], second: Float[Tensor, "o i"]) -> float:
    """Return the share of opposite signs among the entries that both updates change; half for unrelated updates."""
    both = (first != 0) & (second != 0)
    n_both = int(both.sum())
    return int(((first * second < 0) & both).sum()) / n_both if n_both else 0.0
