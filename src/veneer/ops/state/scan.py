"""Scan of a linear recurrence with a matrix as its state: the gated delta rule and Mamba 2.

A head's state S (d_k, d_v) begins at zero in each sequence. A token with query q, key k, value v, decay a and weight β
changes it to ``a S + k (β (v - δ a Sᵀ k))ᵀ`` and gives ``Sᵀ q``. δ is 1 for the gated delta rule (Yang, Kautz and
Hatamizadeh 2024, arXiv 2412.06464, equation 10), and 0 for Mamba 2 (Dao and Gu 2024, arXiv 2405.21060).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veneer.errors import ShapeError
from veneer.ops.dispatch import implementation
from veneer.ops.forks import Fork

CHUNK = 64  # tokens whose products are matrices; between chunks the state is carried over


@dataclass(frozen=True, slots=True)
class ScanInput:
    """Input of a scan for n tokens: queries and keys of ``h_k`` heads, and values, logarithms of decays and weights β
    of ``h`` heads.

    ``h`` is a multiple of ``h_k``: consecutive heads share a query and a key.
    """

    q: Float[Tensor, "n h_k d_k"]
    k: Float[Tensor, "n h_k d_k"]
    v: Float[Tensor, "n h d_v"]
    log_decay: Float[Tensor, "n h"]
    beta: Float[Tensor, "n h"]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The tensors in the order of the fields."""
        return self.q, self.k, self.v, self.log_decay, self.beta


def scan(
    given: ScanInput,
    cu_seqlens: Int[Tensor, " n_sequences_plus_1"],
    *,
    delta: bool,
    forks: Sequence[Fork] = (),
    known: Float[Tensor, "n h d_v"] | None = None,
    backend: str | None = None,
) -> Float[Tensor, "n h d_v"]:
    """Return for each token the product ``Sᵀ q`` of its query with its sequence's state after the token, in v's dtype,
    differentiable in the inputs.

    ``cu_seqlens`` are the bounds of the sequences. ``delta`` selects the gated delta rule; False is Mamba 2. A branch
    of ``forks`` begins with its stem's last state: the stem's tokens are computed again in front of it. ``known`` is
    the result of an earlier call with the same values: a back end that needs it for nothing but the gradients' graph
    does not compute it again. Sums are in float32, or in float64 for such inputs. Raises ShapeError if the parts do
    not fit.
    """
    _require_fitting(given, cu_seqlens, known)
    run = implementation("scan.scan", given.v.device, backend)
    if not forks:
        y: Tensor = run(given, cu_seqlens, delta, known)
        return y
    rows, bounds, own = _unfolded(cu_seqlens, forks)
    rows, own = rows.to(given.v.device), own.to(given.v.device)
    y = run(ScanInput(*(x[rows] for x in given.tensors)), bounds, delta, None)
    return y[own]


def _unfolded(cu_seqlens: Tensor, forks: Sequence[Fork]) -> tuple[Tensor, Tensor, Tensor]:
    """Return index tensors for sequences that have their stems' rows in front.

    These are the row number of each token of the longer sequences, the bounds of these sequences, and the place in them
    of each original row.
    """
    rows, bounds, own = list[int](), [0], list[int]()
    for start, end in pairwise(cu_seqlens.tolist()):
        stems = [fork.stem for fork in forks if fork.branches.start <= start < fork.branches.stop]
        for stem in sorted(stems, key=lambda stem: stem.start):
            rows += range(stem.start, stem.stop)
        own += range(len(rows), len(rows) + end - start)
        rows += range(start, end)
        bounds.append(len(rows))
    return torch.tensor(rows, dtype=torch.long), torch.tensor(bounds), torch.tensor(own, dtype=torch.long)


def _require_fitting(given: ScanInput, cu_seqlens: Tensor, known: Tensor | None) -> None:
    q, k, v, log_decay, beta = given.tensors
    fits = q.ndim == v.ndim == 3 and q.shape == k.shape and len(q) == len(v) and q.shape[1] > 0
    fits = fits and v.shape[1] % q.shape[1] == 0 and log_decay.shape == beta.shape == v.shape[:2]
    bounds = cu_seqlens.tolist() if cu_seqlens.ndim == 1 else []
    fits = fits and (known is None or known.shape == v.shape)
    if not fits or bounds[:1] != [0] or bounds[-1] != len(v) or bounds != sorted(bounds):
        raise ShapeError(
            "a scan takes queries and keys (n, h_k, d_k), values (n, h, d_v) with h a multiple of h_k, decays and "
            "weights (n, h), a known result like the values, and bounds that rise from 0 to n; given "
            f"{', '.join(map(_told, given.tensors))}, {'no' if known is None else _told(known)} result "
            f"and bounds from {bounds[:1]} to {bounds[-1:]}"
        )


def _told(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype}"
