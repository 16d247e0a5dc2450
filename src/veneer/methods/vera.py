"""VeRA: ``W + diag(b) B diag(d) A``, random A and B shared by all layers, vectors d and b trained (Kopiczko et al.
2024, arXiv:2310.11454, eq. 2).

A and B are drawn once, from ``projection_prng_key``, as large as the largest layer needs. Each layer takes the first
columns of A and the first rows of B. d starts at ``d_initial``, b at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.known import Known
from veneer.contract.patterns import below_one
from veneer.contract.seeds import no_seeds
from veneer.contract.shared import Shared
from veneer.contract.targets import FamilyTargets
from veneer.core.records import LinearDelta
from veneer.core.sites import LinearSite
from veneer.inits.projections import projections
from veneer.ops.traced import is_tracing


@dataclass(frozen=True, kw_only=True)
class VeraConfig(LinearMethod):
    """VeRA in PEFT's fields.

    ``save_projection`` writes A and B too. If a file holds them, they are checked against ``projection_prng_key``.
    ``projection_size`` (largest output, largest input of the adapted layers) is filled in when the adapter is attached.
    """

    peft_type: ClassVar[str] = "VERA"
    headline: ClassVar[tuple[str, ...]] = ("r", "target_modules")
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    usual_learning_rate: ClassVar[float] = 5e-3
    inert: ClassVar[frozenset[str]] = frozenset(
        {"r", "save_projection", "vera_dropout", "d_initial", "fan_in_fan_out", "bias", "init_weights"}
        | {"projection_size"}  # follows from the layers
    )

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "vera_only"] = "none"
    init_weights: bool = True
    projection_size: tuple[int, int] | None = field(default=None, metadata={"on_disk": False})

    def problems(self) -> list[str]:
        found = super().problems() + below_one({"r": self.r})
        found += no_seeds({"projection_prng_key": self.projection_prng_key})
        if not 0 <= self.vera_dropout < 1:
            found.append(f"vera_dropout={self.vera_dropout!r} must lie in [0, 1)")
        if self.d_initial == 0:
            found.append(f"d_initial={self.d_initial!r} must be a finite number other than 0")
        return found

    @property
    def largest_rank(self) -> int:
        return self.r

    def for_sites(self, sites: Sequence[LinearSite], known: Known) -> Self:
        largest = max(site.out_features for site in sites), max(site.in_features for site in sites)
        return replace(self, projection_size=largest)

    def shapes(self, site: LinearSite) -> Shapes:
        return {"vera_lambda_b": (site.out_features,), "vera_lambda_d": (self.r,)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        if not self.init_weights:  # as in PEFT's tests: not the base model at the start
            d = torch.randn(self.r, generator=generator)
            return {"vera_lambda_b": torch.ones(site.out_features), "vera_lambda_d": d}
        return {"vera_lambda_b": torch.zeros(site.out_features), "vera_lambda_d": torch.full((self.r,), self.d_initial)}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        b, d = params["vera_lambda_b"], params["vera_lambda_d"]
        rows, columns = self.projection_size or (site.out_features, site.in_features)
        draw = projections.__wrapped__ if is_tracing() else projections  # a traced step makes tensors without values
        shapes = (self.r, columns), (rows, self.r)
        big_a, big_b = draw(self.projection_prng_key, *shapes, device=d.device, dtype=d.dtype)
        return LinearDelta.pair(big_a[:, : site.in_features], big_b[: site.out_features], core=d, b_scale=b)

    @property
    def shared(self) -> Shared | None:
        source = f"projection_prng_key={self.projection_prng_key!r}"
        return Shared(names=("vera_A", "vera_B"), draw=self._projections, source=source, is_saved=self.save_projection)

    def _projections(self) -> dict[str, Tensor]:
        if self.projection_size is None:
            return {}
        rows, columns = self.projection_size
        shapes = (self.r, columns), (rows, self.r)
        a, b = projections(self.projection_prng_key, *shapes, device=torch.device("cpu"), dtype=torch.float32)
        return {"vera_A": a, "vera_B": b}

    @property
    def dropout(self) -> float:
        return self.vera_dropout
