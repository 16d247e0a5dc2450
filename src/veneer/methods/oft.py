"""OFT: ``W R``, the inputs rotated by blocks before the weight (Qiu et al. 2023, arXiv:2306.07280, section 3.3).

Each block is Cayley's transform of a skew-symmetric Q: ``R = (I - Q) (I + Q)⁻¹``. As in PEFT, it may be the first terms
of its Neumann series: ``I + 2 Q + 2 Q² + … + Qⁿ``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks, GroupChecks
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.targets import FamilyTargets
from veneer.core.orthogonal import cayley, neumann, skew_symmetric
from veneer.core.records import LinearDelta
from veneer.core.sites import LinearSite
from veneer.core.terms.rotation import BlockRotation

_MOST_TERMS = 100  # of a Neumann series; a handful are enough


@dataclass(frozen=True, kw_only=True)
class OFTConfig(LinearMethod):
    """OFT in PEFT's fields.

    ``r`` is the number of blocks, ``oft_block_size`` their size: one of them is 0 and follows from the other. One that
    does not divide a layer's inputs becomes the nearest that does. ``block_share``: all blocks of a layer are one.
    ``coft`` keeps each block within ``eps`` of the identity. An embedding's outputs are rotated, and a convolution's
    patches.

    ``module_dropout`` and ``coft`` are read from files; training with them is refused.

    Departs: PEFT sums the patches that overlap in its forward pass at a kernel wider than 1, so that its model changes
    once it is merged. Here both are its merged model.
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

    def problems(self) -> list[str]:
        found = super().problems()
        sizes = self.r, self.oft_block_size
        if min(sizes) < 0 or (sizes[0] == 0) == (sizes[1] == 0):
            found.append(f"r={sizes[0]!r} and oft_block_size={sizes[1]!r}: one must be 0 and the other at least 1")
        if not 1 <= self.num_cayley_neumann_terms <= _MOST_TERMS:
            found.append(f"num_cayley_neumann_terms={self.num_cayley_neumann_terms!r} must lie in [1, {_MOST_TERMS}]")
        if self.module_dropout and not self.inference_mode:
            found.append(
                f"module_dropout={self.module_dropout!r} drops blocks in training, which is not supported: set it to 0"
            )
        if self.coft and not self.inference_mode:
            found.append("coft=True moves parameters in the forward pass, which is not supported in training: drop it")
        return found

    def blocks(self, site: LinearSite) -> tuple[int, int]:
        """Return the number of blocks at a site, and their size."""
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
        return {"oft_R": torch.zeros(shape) if self.init_weights else 0.1 * torch.randn(shape, generator=generator)}

    def disk_names(self, site: LinearSite) -> dict[str, str]:
        return {"oft_R": "oft_embedding_R.weight" if site.kind == "embedding" else "oft_R.weight"}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        n, size = self.blocks(site)
        q = skew_symmetric(params["oft_R"], size)
        if self.coft:
            q = self._near_identity(q)
        r = neumann(q, self.num_cayley_neumann_terms) if self.use_cayley_neumann else cayley(q)
        rotation = BlockRotation(r.mT.expand(n, size, size))
        return LinearDelta(output=rotation) if site.kind == "embedding" else LinearDelta(input=rotation)

    @property
    def checks(self) -> Checks:
        return GroupChecks()

    def _near_identity(self, q: Tensor) -> Tensor:
        """Blocks of a norm of at most eps / √n; longer ones are scaled down to it."""
        eps = self.eps / math.sqrt(len(q))
        norm = q.norm(dim=(1, 2), keepdim=True)
        return torch.where(norm <= eps, q, eps * q / norm)


@functools.cache
def nearest_divisor(n: int, wanted: int) -> int:
    """Return the divisor of n nearest to ``wanted``, the smaller of two; n itself if ``wanted`` is not below it."""
    if wanted >= n:
        return n
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d))
