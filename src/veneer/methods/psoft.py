"""PSOFT: ``W + s B (R - I) A``, R an orthogonal matrix in the principal subspace of W (Wu et al. 2025,
arXiv:2505.11235, eq. 7).

``s B A`` are the r largest parts of W's singular value decomposition, and never trained. R is Cayley's transform of a
skew-symmetric matrix, with a trained scale for each of its rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.needed import needed_weight
from veneer.contract.patterns import below_one
from veneer.contract.seeds import no_seeds
from veneer.contract.targets import FamilyTargets
from veneer.ops.traced import is_tracing
from veneer.records.deltas import LinearDelta
from veneer.records.orthogonal import cayley, neumann, skew_symmetric
from veneer.records.sites import LinearSite


@dataclass(frozen=True, kw_only=True)
class PsoftConfig(LinearMethod):
    """Settings of PSOFT, with the names that PEFT gives them.

    A and B follow from the weight of the base and are not in the file. On another device or in another library their
    singular vectors may have other signs, which changes the update: ``save_as_lora`` stores the factors instead.
    ``ab_svd_init="pissa_init"`` divides the singular values between A and B. ``psoft_svd="lowrank"`` finds A and B by
    ``psoft_svd_lowrank_niter`` steps of a randomized method, drawn from ``random_seed``. ``psoft_orth=False`` makes R a
    free matrix. ``psoft_mag_a`` trains a scale for each column of R, ``psoft_mag_b`` for each row.
    """

    peft_type: ClassVar[str] = "PSOFT"
    headline: ClassVar[tuple[str, ...]] = ("r", "psoft_alpha", "target_modules")
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    inert: ClassVar[frozenset[str]] = frozenset({"psoft_dropout", "fan_in_fan_out", "init_weights"})

    r: int = 32
    psoft_alpha: float = 32
    psoft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    psoft_svd: Literal["full", "lowrank"] = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None
    init_weights: bool = True

    def problems(self) -> list[str]:
        counts = {name: getattr(self, name) for name in ("r", "num_cayley_neumann_terms")}
        found = super().problems() + below_one(counts) + no_seeds({"random_seed": self.random_seed})
        if not 0 <= self.psoft_dropout < 1:
            found.append(f"psoft_dropout={self.psoft_dropout!r} must lie in [0, 1)")
        if self.psoft_alpha <= 0:
            found.append(f"psoft_alpha={self.psoft_alpha!r} must be above 0")
        if self.psoft_svd_lowrank_niter < 0:
            found.append(f"psoft_svd_lowrank_niter={self.psoft_svd_lowrank_niter!r} must be at least 0")
        if self.cayley_neumann_eps is not None and not 0 < self.cayley_neumann_eps < 1:
            found.append(f"cayley_neumann_eps={self.cayley_neumann_eps!r} must lie between 0 and 1, or be None")
        return found

    @property
    def checks(self) -> Checks:
        return _Checks(self.r)

    @property
    def largest_rank(self) -> int:
        return self.r

    @property
    def dropout(self) -> float:
        return self.psoft_dropout

    @property
    def reads_weight(self) -> bool:
        return True

    def shapes(self, site: LinearSite) -> Shapes:
        r = self.r
        found: Shapes = {"psoft_R": (r * (r - 1) // 2,) if self.psoft_orth else (r, r)}
        found |= {"vector_b": (r,)} if self.psoft_mag_b else {}
        return found | ({"vector_a": (r,)} if self.psoft_mag_a else {})

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        shape = self.shapes(site)["psoft_R"]
        start = torch.zeros(shape) if self.psoft_orth else torch.eye(self.r)
        moved = 0 if self.init_weights else 0.1 * torch.randn(shape, generator=generator)
        scales = {name: torch.ones(self.r) for name in self.shapes(site) if name != "psoft_R"}
        return {"psoft_R": start + moved, **scales}

    def disk_names(self, site: LinearSite) -> dict[str, str]:
        ends = {"psoft_R": "psoft_R.weight", "vector_b": "psoft_R.vector_b", "vector_a": "psoft_R.vector_a"}
        return {name: ends[name] for name in self.shapes(site)}

    def derived(self, site: LinearSite, params: Params) -> dict[str, Tensor]:
        if is_tracing():  # of a plan, before weights have values
            return {"A": torch.empty(self.r, site.in_features), "B": torch.empty(site.out_features, self.r)}
        u, s, v = self._largest_parts(needed_weight(site, "PSOFT").dense(torch.float32).detach())
        s = s * self.r / self.psoft_alpha
        if self.ab_svd_init == "psoft_init":
            return {"A": v.contiguous(), "B": u * s}
        return {"A": s.sqrt()[:, None] * v, "B": u * s.sqrt()}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        factors = params if "A" in params else self.derived(site, params)
        r = self._map(params)
        a, b = (factors[name].to(r.device, r.dtype) for name in "AB")
        less = r - torch.eye(self.r, dtype=r.dtype, device=r.device)
        return LinearDelta.pair(a, b @ less, scale=self.psoft_alpha / self.r)

    def _largest_parts(self, w: Float[Tensor, "o i"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the r largest singular values of the weight, with the left and the right singular vectors."""
        if self.psoft_svd == "full":
            u, s, v = torch.linalg.svd(w, full_matrices=False)
            return u[:, : self.r], s[: self.r], v[: self.r]
        with torch.random.fork_rng(devices=[] if w.device.type == "cpu" else [w.device], device_type=w.device.type):
            torch.manual_seed(self.random_seed)
            u, s, v = torch.svd_lowrank(w, q=self.r, niter=self.psoft_svd_lowrank_niter)
        return u, s, v.T

    def _map(self, params: Params) -> Float[Tensor, "r r"]:
        """Return the matrix R, multiplied by the trained scales of its rows and columns if the config has them."""
        r = self._rotation(params["psoft_R"]) if self.psoft_orth else params["psoft_R"]
        r = params["vector_b"][:, None] * r if self.psoft_mag_b else r
        return r * params["vector_a"] if self.psoft_mag_a else r

    def _rotation(self, upper: Float[Tensor, " n"]) -> Float[Tensor, "r r"]:
        q = skew_symmetric(upper[None], self.r)[0]
        if not self.use_cayley_neumann:
            return cayley(-q)
        if self.cayley_neumann_eps is not None:
            norm = q.norm()
            q = torch.where(norm > self.cayley_neumann_eps, q * (self.cayley_neumann_eps / (norm + 1e-12)), q)
        return neumann(q[None], self.num_cayley_neumann_terms)[0]


@dataclass(frozen=True)
class _Checks(Checks):
    r: int

    def layers(self, sites: Sequence[LinearSite]) -> list[str]:
        """Return a problem for each layer whose smaller width is below the rank."""
        return [
            f"r={self.r} at {site.name}, a weight of {site.out_features} x {site.in_features}: give at most {least}"
            for site in sites
            if (least := min(site.out_features, site.in_features)) < self.r
        ]
