"""Orthogonal matrices from skew-symmetric ones, for methods that rotate."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def skew_symmetric(upper: Float[Tensor, "n k"], size: int) -> Float[Tensor, "n b b"]:
    """Return skew-symmetric matrices with the entries ``upper`` above the diagonal, row by row."""
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    half = upper.new_zeros(len(upper), size * size).index_copy(1, rows * size + columns, upper).view(-1, size, size)
    return half - half.mT


def cayley(q: Float[Tensor, "*n b b"]) -> Float[Tensor, "*n b b"]:
    """Return ``(I - Q) (I + Q)⁻¹``, orthogonal for skew-symmetric Q. Computed as ``2 (I + Q)⁻¹ - I``."""
    wide = q.to(torch.promote_types(q.dtype, torch.float32))  # torch inverts nothing in 16 bits
    identity = torch.eye(q.shape[-1], dtype=wide.dtype, device=q.device)
    turned: Tensor = 2 * torch.linalg.inv(identity + wide) - identity
    return turned.to(q.dtype)


def neumann(q: Float[Tensor, "n b b"], n_terms: int) -> Float[Tensor, "n b b"]:
    """Return ``I + 2 Q + … + 2 Qⁿ⁻² + Qⁿ⁻¹`` for ``n_terms`` = n of at least 4. As in PEFT, fewer terms follow another
    rule.

    Three terms give the sum of four, two give ``I + 2 Q``, and one gives I.
    """
    r = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q)
    if n_terms == 1:
        return r
    r = r + 2 * q
    if n_terms == 2:
        return r
    power = q @ q
    r = r + 2 * power
    for _ in range(3, n_terms - 1):
        power = power @ q
        r = r + 2 * power
    return r + power @ q
