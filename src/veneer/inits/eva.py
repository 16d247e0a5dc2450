"""EVA: A starts as the principal directions of a layer's inputs, B as zero. Ranks go to the best directions.

Source: Paischer et al. 2024, arXiv:2410.07170, section 3 and algorithm 1. The decomposition of all rows seen is updated
batch by batch, with centring, as in the paper's code (Ross et al. 2008, "Incremental learning for robust visual
tracking", section 2.1).

Differences: the arbitrary sign of a direction is left out of the cosine. A direction in which the rows do not
vary counts as converged; the paper's code would wait for it for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from veneer.contract.settings import Settings
from veneer.inits import Start
from veneer.inits.lowrank import kaiming
from veneer.inits.pissa import leading_triplets

NAMES = ("'eva'",)
_POWER_ITERATIONS = 2
_SEED = 0  # of the randomized decomposition: the same batches give the same factors


def find(name: bool | str) -> Start | None:
    """Return the initialisation "eva"; None for another name. It is plain LoRA's until a pass over data gives A its
    directions.
    """
    return Start(kaiming) if name == "eva" else None


@dataclass(frozen=True)
class EvaConfig(Settings):
    """Settings of EVA, with PEFT's names for the fields.

    ``rho``: no layer gets a rank above ``rho · r``; with 1 all layers keep rank r. ``tau``: a direction has converged
    if the cosine between it before the last batch and after is at least ``tau``. ``use_label_mask``: tokens whose label
    is ``label_mask_value`` are left out. ``whiten``: rows of A are divided by the root of their singular values.
    ``adjust_scaling_factors``: alpha changes with the layer's rank, so that the scale of B A stays.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def problems(self) -> list[str]:
        found = [] if self.rho >= 1 else [f"rho={self.rho!r} must be a finite number of at least 1"]
        return found if 0 <= self.tau <= 1 else [*found, f"tau={self.tau!r} must lie in [0, 1]"]


@dataclass(frozen=True)
class Directions:
    """Leading k directions of the rows seen so far, and the state for updating them.

    ``values`` are singular values of the centred rows, and ``total`` is the squared length of all those rows together.
    ``cosines`` compares each direction with the same one before the last batch; None after the first batch.
    """

    vectors: Float[Tensor, "k i"]
    values: Float[Tensor, " k"]
    mean: Float[Tensor, " i"]
    n_rows: int
    total: Float[Tensor, ""]
    cosines: Float[Tensor, " k"] | None

    def explained(self) -> Float[Tensor, " k"]:
        """Return the share of the variance that each direction explains."""
        return self.values.square() / self.total.to(self.values.dtype).clamp_min(torch.finfo(self.values.dtype).tiny)

    def varies(self) -> Bool[Tensor, " k"]:
        """Return True for each direction along which the rows vary by more than rounding."""
        rounding = torch.finfo(self.values.dtype).eps * max(self.vectors.shape)
        return self.values > rounding * self.values[:1]

    def settled(self, tau: float) -> Bool[Tensor, " k"]:
        """Return True for each direction whose cosine with itself before the last batch is at least ``tau``, or along
        which rows do not vary.

        After the first batch, all are False.
        """
        if self.cosines is None:
            return torch.zeros_like(self.values, dtype=torch.bool)
        return (self.cosines >= tau) | ~self.varies()

    def start(self, r: int, whiten: bool) -> Float[Tensor, "r i"]:
        """Return the first r directions as the initial A. With ``whiten``, each is divided by the root of its singular
        value.

        A direction without variance keeps its length of 1.
        """
        length = torch.where(self.varies(), self.values, 1.0).sqrt() if whiten else torch.ones_like(self.values)
        return (self.vectors / length[:, None])[:r]


def updated(before: Directions | None, rows: Float[Tensor, "n i"], k: int) -> Directions:
    """Return the directions after another batch, of at least k rows, in float32."""
    rows, n = rows.to(torch.float32), rows.shape[0]
    mean = rows.mean(dim=0, dtype=torch.float64)
    centred = rows - mean.to(rows.dtype)
    total, n_rows, stacked = centred.square().sum(dtype=torch.float64), n, centred
    if before is not None:
        n_rows = before.n_rows + n
        shift = (before.n_rows * n / n_rows) ** 0.5 * (before.mean - mean)  # between the two means
        total = before.total + total + shift.square().sum()
        mean = (before.n_rows * before.mean + n * mean) / n_rows
        stacked = torch.cat([before.values[:, None] * before.vectors, centred, shift.to(rows.dtype)[None]])
    _, values, vectors = leading_triplets(stacked, k, _POWER_ITERATIONS, torch.Generator().manual_seed(_SEED))
    cosines = None if before is None else (vectors * before.vectors).sum(dim=1).abs()
    return Directions(vectors, values, mean, n_rows, total, cosines)


def shared_ranks(explained: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Return the rank of each layer: the number of its directions among the ``budget`` best ones of all layers.

    A direction is ranked by the variance that it explains in its own layer. If two are equal, the earlier layer's comes
    first.
    """
    owners = [path for path, values in explained.items() for _ in range(len(values))]
    order = torch.cat([values.cpu() for values in explained.values()]).argsort(descending=True, stable=True)
    ranks = dict.fromkeys(explained, 0)
    for place in order[:budget].tolist():
        ranks[owners[place]] += 1
    return ranks
