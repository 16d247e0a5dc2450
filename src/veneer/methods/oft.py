"""OFT: ``W R``, the inputs rotated by blocks before the weight (Qiu et al. 2023, arXiv:2306.07280, section 3.3).

Each block is Cayley's transform of a skew-symmetric Q: ``R = (I - Q) (I + Q)⁻¹``. As in PEFT, it may be the first terms
of its Neumann series: ``I + 2 Q + 2 Q² + … + Qⁿ``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks, GroupChecks
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.rates import no_rates
from veneer.contract.targets import FamilyTargets
from veneer.contract.training import Schedule, Training
from veneer.records.deltas import LinearDelta
from veneer.records.dropped_blocks import DROPPED, dropped_blocks, identity_at
from veneer.records.orthogonal import cayley, neumann, skew_symmetric
from veneer.records.sites import LinearSite
from veneer.records.terms.rotation import BlockRotation

_SIZES = ("r", "oft_block_size")  # of which one is given
_MOST_TERMS = 100  # of a Neumann series; a handful are enough


@dataclass(frozen=True, kw_only=True)
class OFTConfig(LinearMethod):
    """Settings of OFT, with the names that PEFT gives them.

    ``r`` is the number of blocks, ``oft_block_size`` their size: one of them is 0 and follows from the other. If the
    other does not divide a layer's inputs, it becomes the nearest divisor. ``block_share``: all blocks of a layer are
    one. ``coft`` keeps each block within ``eps`` of the identity: the update uses the nearest block within, and each
    step of a run moves the parameters there. At an embedding the outputs are rotated, at a convolution the patches.
    ``module_dropout``: share of a layer's blocks that are the identity in a training pass, rounded down to a whole
    number. One block, or shared ones, are never dropped.
    Difference from PEFT: at a kernel wider than 1, PEFT's forward pass sums overlapping patches, so that its model
    changes when merged. Here both passes equal PEFT's merged model. ``module_dropout`` has no effect in PEFT.
    """

    peft_type: ClassVar[str] = "OFT"
    headline: ClassVar[tuple[str, ...]] = ("r", "oft_block_size", "target_modules")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "convolution", "embedding"})
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    inert: ClassVar[frozenset[str]] = frozenset(
        {"r", "oft_block_size", "module_dropout", "fan_in_fan_out", "bias", "init_weights"}
    )

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "oft_only"] = "none"
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def told(self) -> dict[str, object]:
        """Return the settings to show to people. Of block size and number of blocks, the one that is 0 is left out."""
        return {name: value for name, value in super().told().items() if value != 0 or name not in _SIZES}

    def problems(self) -> list[str]:
        found = super().problems()
        sizes = self.r, self.oft_block_size
        if min(sizes) < 0 or (sizes[0] == 0) == (sizes[1] == 0):
            found.append(f"r={sizes[0]!r} and oft_block_size={sizes[1]!r}: one must be 0 and the other at least 1")
        if not 1 <= self.num_cayley_neumann_terms <= _MOST_TERMS:
            found.append(f"num_cayley_neumann_terms={self.num_cayley_neumann_terms!r} must lie in [1, {_MOST_TERMS}]")
        return found + no_rates(self, "module_dropout")

    def blocks(self, site: LinearSite) -> tuple[int, int]:
        """Return the number of blocks in a layer, and their size."""
        n = site.out_features if site.kind == "embedding" else site.in_features
        if self.r:
            r = nearest_divisor(n, self.r)
            return r, n // r
        size = nearest_divisor(n, self.oft_block_size)
        return n // size, size

    def shapes(self, site: LinearSite) -> Shapes:
        n, size = self.blocks(site)
        return {"oft_R": (1 if self.block_share else n, size * (size - 1) // 2)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        shape = self.shapes(site)["oft_R"]
        start = torch.zeros(shape) if self.init_weights else 0.1 * torch.randn(shape, generator=generator)
        return {"oft_R": near_identity(start, self.eps) if self.coft else start}

    def disk_names(self, site: LinearSite) -> dict[str, str]:
        return {"oft_R": "oft_embedding_R.weight" if site.kind == "embedding" else "oft_R.weight"}

    def drawn(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return marks of the blocks that dropout replaces by the identity in a pass, drawn as PEFT draws them."""
        n = 1 if self.block_share else self.blocks(site)[0]
        return {DROPPED: dropped_blocks(n, self.module_dropout, generator)} if self.module_dropout and n > 1 else {}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        n, size = self.blocks(site)
        entries = params["oft_R"]
        if self.coft:  # gradients are those at the nearest point, to which a step moves the parameters
            entries = entries + (near_identity(entries, self.eps) - entries).detach()
        q = skew_symmetric(entries, size)
        r = neumann(q, self.num_cayley_neumann_terms) if self.use_cayley_neumann else cayley(q)
        if DROPPED in params:
            r = identity_at(params[DROPPED], r)
        rotation = BlockRotation(r.mT.expand(n, size, size))
        return LinearDelta(output=rotation) if site.kind == "embedding" else LinearDelta(input=rotation)

    @property
    def checks(self) -> Checks:
        return GroupChecks()

    @property
    def training(self) -> Training | None:
        return ConstrainedTraining(self.eps) if self.coft else None


def near_identity(entries: Float[Tensor, "n m"], eps: float) -> Float[Tensor, "n m"]:
    """Return the entries above the diagonal of n skew-symmetric blocks, each scaled down to a norm of at most ``eps /
    √n``.

    The norm is Frobenius's, which counts each entry twice.
    """
    largest = eps / math.sqrt(len(entries))
    norm = math.sqrt(2) * entries.norm(dim=1, keepdim=True)
    return torch.where(norm <= largest, entries, largest * entries / norm)


@dataclass(frozen=True)
class ConstrainedTraining(Training):
    """Projection of all blocks after each step."""

    eps: float

    def schedule(self, layers: Mapping[str, Params]) -> Schedule:
        made = _Projection([params["oft_R"] for params in layers.values()], self.eps)
        made.step(0)  # an adapter of PEFT's is written as its last step left it, without the projection
        return made


class _Projection(Schedule):
    """Schedule that moves blocks that have left the ball around the identity back onto it."""

    def __init__(self, layers: Sequence[Tensor], eps: float) -> None:
        self.layers, self.eps = layers, eps

    @torch.no_grad()
    def step(self, step: int) -> None:
        for entries in self.layers:
            entries.copy_(near_identity(entries, self.eps))

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore nothing: the next step depends on the parameters alone."""


@functools.cache
def nearest_divisor(n: int, wanted: int) -> int:
    """Return the divisor of n nearest to ``wanted``, the smaller of two; n itself if ``wanted`` is not below it."""
    if wanted >= n:
        return n
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))
