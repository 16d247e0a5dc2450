"""VeRA: ``W + diag(b) B diag(d) A``, random A and B shared by all layers, vectors d and b trained (Kopiczko et al.
2024, arXiv:2310.11454, eq. 2).

A and B are drawn once, from ``projection_prng_key``, as large as the largest layer needs. Each layer takes the first
columns of A and the first rows of B. d starts at ``d_initial``, b at zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.contract import Params, Shapes
from veneer.contract.projected import ProjectedMethod
from veneer.contract.shared import Shared
from veneer.inits.projections import projections
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite


@dataclass(frozen=True, kw_only=True)
class VeraConfig(ProjectedMethod):
    """Settings of VeRA, with the names that PEFT gives them.

    ``save_projection`` writes A and B too. If a file holds them, they are checked against ``projection_prng_key``.
    ``projection_size`` (largest output, largest input of the adapted layers) is filled in when the adapter is attached.
    """

    peft_type: ClassVar[str] = "VERA"
    rate: ClassVar[str] = "vera_dropout"
    inert: ClassVar[frozenset[str]] = frozenset({"vera_dropout"})

    vera_dropout: float = 0.0
    bias: Literal["none", "all", "vera_only"] = "none"

    def shapes(self, site: LinearSite) -> Shapes:
        return {"vera_lambda_b": (site.out_features,), "vera_lambda_d": (self.r,)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        if not self.init_weights:  # as in PEFT's tests: not the base model at the start
            d = torch.randn(self.r, generator=generator)
            return {"vera_lambda_b": torch.ones(site.out_features), "vera_lambda_d": d}
        return {"vera_lambda_b": torch.zeros(site.out_features), "vera_lambda_d": torch.full((self.r,), self.d_initial)}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        b, d = params["vera_lambda_b"], params["vera_lambda_d"]
        size = self.projection_size or (site.out_features, site.in_features)
        big_a, big_b = self._projections(size, d.device, d.dtype)
        return LinearDelta.pair(big_a[:, : site.in_features], big_b[: site.out_features], core=d, b_scale=b)

    @property
    def shared(self) -> Shared | None:
        source = f"projection_prng_key={self.projection_prng_key!r}"
        return Shared(names=("vera_A", "vera_B"), draw=self._saved, source=source, is_saved=self.save_projection)

    def _saved(self) -> dict[str, Tensor]:
        if self.projection_size is None:
            return {}
        a, b = self._projections(self.projection_size, torch.device("cpu"), torch.float32)
        return {"vera_A": a, "vera_B": b}

    def _projections(
        self, size: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
        rows, columns = size
        return projections(self.projection_prng_key, (self.r, columns), (rows, self.r), device=device, dtype=dtype)

    @property
    def dropout(self) -> float:
        return self.vera_dropout
