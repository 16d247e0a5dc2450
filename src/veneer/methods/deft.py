"""DEFT: ``W - Q Pᵀ W + s Q R``, a subspace of the weight is removed and another one added (PEFT's method; no paper).

The update is a pair of rank r: ``B = Q`` and ``A = s R - Pᵀ W``. Q and P follow from one trained matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.needed import needed_weight
from veneer.contract.patterns import below_one
from veneer.contract.targets import FamilyTargets
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite


@dataclass(frozen=True, kw_only=True)
class DeftConfig(LinearMethod):
    """Settings of DEFT, with the names that PEFT gives them.

    ``decomposition_method``: with "relu", Q is the trained matrix and P its positive part; with "qr", both are its
    orthogonal factor. ``para`` only subtracts the subspace (PaRa), so that a new adapter changes outputs. ``alpha``:
    the scale s is ``alpha / r``, or 1 if it is None. ``init_weights`` starts R so that nothing changes; False draws R
    at random, times ``init_scale``. ``deft_dropout`` is read from files; training with it is refused.
    """

    peft_type: ClassVar[str] = "DEFT"
    headline: ClassVar[tuple[str, ...]] = ("r", "alpha", "target_modules")
    outward: ClassVar[frozenset[str]] = frozenset({"deft_P"})
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    inert: ClassVar[frozenset[str]] = frozenset(
        {"init_scale", "fan_in_fan_out", "deft_dropout", "bias", "init_weights"}
    )

    r: int = 8
    decomposition_method: Literal["relu", "qr"] = "relu"
    init_scale: float = 1.0
    alpha: float | None = None
    para: bool = False
    fan_in_fan_out: bool = False
    deft_dropout: float = 0.0
    bias: Literal["none", "all", "deft_only"] = "none"
    init_weights: bool = True

    def problems(self) -> list[str]:
        found = super().problems() + below_one({"r": self.r})
        if self.alpha is not None and self.alpha <= 0:
            found.append(f"alpha={self.alpha!r} must be above 0, or None for a scale of 1")
        if self.deft_dropout and not self.inference_mode:
            found.append(
                f"deft_dropout={self.deft_dropout!r} drops inputs of a part of the update in training, which is not "
                "supported: set it to 0"
            )
        return found

    @property
    def largest_rank(self) -> int:
        return self.r

    @property
    def reads_weight(self) -> bool:
        return True

    def shapes(self, site: LinearSite) -> Shapes:
        r = min(self.r, site.out_features)
        shapes: Shapes = {"deft_P": (site.out_features, r)}
        return shapes if self.para else {**shapes, "deft_R": (r, site.in_features)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        shapes = self.shapes(site)
        found = {"deft_P": 0.02 * torch.randn(shapes["deft_P"], generator=generator)}
        if self.para:
            return found
        if not self.init_weights:
            drawn = torch.randn(shapes["deft_R"], generator=generator)
            return {**found, "deft_R": 0.02 * self.init_scale * drawn}
        if site.weight is None:  # in planning, before it is loaded
            return {**found, "deft_R": torch.zeros(shapes["deft_R"])}
        _, right = self._sides(found["deft_P"])
        kept = site.weight.dense(torch.float32).detach().to("cpu")
        return {**found, "deft_R": right.T @ kept / self._scale(shapes["deft_P"][1])}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        weight = needed_weight(site, "DEFT")
        p = params["deft_P"]
        q, right = self._sides(p.to(torch.promote_types(p.dtype, torch.float32)))  # torch factors nothing in 16 bits
        taken = weight.matmul_t(right.T).to(p.dtype)
        put = 0 if self.para else self._scale(p.shape[1]) * params["deft_R"]
        return LinearDelta.pair(put - taken, q.to(p.dtype))

    def site_of(self, site: LinearSite, shapes: Mapping[str, tuple[int, ...]]) -> LinearSite | None:
        if "deft_R" not in shapes:
            return None
        return replace(site, in_features=shapes["deft_R"][1], out_features=shapes["deft_P"][0])

    def _scale(self, r: int) -> float:
        return 1.0 if self.alpha is None else self.alpha / r

    def _sides(self, p: Float[Tensor, "o r"]) -> tuple[Float[Tensor, "o r"], Float[Tensor, "o r"]]:
        """Return Q and P, the two sides of the projector ``Q Pᵀ``."""
        if self.decomposition_method == "relu":
            return p, p.relu()
        q: Tensor = torch.linalg.qr(p).Q
        return q, q
