"""PiSSA: the factors start as the principal singular triplets of the frozen weight: ``A = √S Vᵀ``, ``B = U √S``.

The rest of the weight stays frozen. Source: Meng et al. 2024, arXiv:2404.02948, eq. 2 to 4. ``"pissa"`` takes the exact
decomposition, ``"pissa_niter_4"`` a randomized one with that many power iterations.

Difference from PEFT: the principal part is subtracted in the record instead of in the weight, which is the same
function of A and B.
"""

from __future__ import annotations

import functools
import math
import re

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.inits import Factors, Start, dense_weight
from veneer.records.sites import LinearSite

NAMES = ("'pissa'", "'pissa_niter_4'")


def find(name: bool | str) -> Start | None:
    """Return the exact initialisation for "pissa", the randomized one for "pissa_niter_N" with N iterations, and None
    for another name.
    """
    match = re.fullmatch(r"pissa(?:_niter_(\d+))?", str(name))
    if match is None:
        return None
    n_iterations = None if match.group(1) is None else int(match.group(1))
    return Start(functools.partial(principal, n_iterations=n_iterations), taken_off=True)


def principal(
    site: LinearSite, r: int, scale: float, generator: torch.Generator | None = None, n_iterations: int | None = None
) -> Factors:
    """Return A and B with ``scale · B A`` the best rank-r approximation of W. Raises ConfigError if W is not loaded."""
    u, s, vt = leading_triplets(dense_weight(site, r, "PiSSA"), r, n_iterations, generator)
    return best_factors(u, s, vt, scale)


def best_factors(u: Float[Tensor, "o r"], s: Float[Tensor, " r"], vt: Float[Tensor, "r i"], scale: float) -> Factors:
    """Return A and B with ``scale · B A = U S Vᵀ``, each with the root of the singular values, on the CPU."""
    root = (s / abs(scale)).sqrt()
    return (root[:, None] * vt).cpu().contiguous(), (u * math.copysign(1.0, scale) * root).cpu().contiguous()


def leading_triplets(
    w: Float[Tensor, "o i"], r: int, n_iterations: int | None, generator: torch.Generator | None
) -> tuple[Float[Tensor, "o r"], Float[Tensor, " r"], Float[Tensor, "r i"]]:
    """Return the r leading singular triplets U, S, Vᵀ: exact if ``n_iterations`` is None, else randomized with that
    many power iterations.
    """
    if n_iterations is None:
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
        return u[:, :r], s[:r], vt[:r]
    probe = torch.randn(w.shape[1], min(2 * r, *w.shape), generator=generator).to(w)
    basis = torch.linalg.qr(w @ probe).Q
    for _ in range(n_iterations):  # Halko et al. 2011, arXiv:0909.4061, algorithm 4.4
        basis = torch.linalg.qr(w @ torch.linalg.qr(w.T @ basis).Q).Q
    u, s, vt = torch.linalg.svd(basis.T @ w, full_matrices=False)
    return (basis @ u)[:, :r], s[:r], vt[:r]
