"""KaSA: the r least singular triplets of W taken off, and ``s B diag(d) A`` added, d trained (Wang et al. 2024,
arXiv:2412.06071, sections 3.1 and 3.2).

Departs: the triplets are taken off in the record instead of in the weight, which is the same function of A, B and d.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.contract.needed import needed_weight
from veneer.contract.parameters import Params
from veneer.core.field_types import check, settings_of
from veneer.core.records import LinearDelta
from veneer.core.sites import LinearSite
from veneer.core.terms.pair import Pair
from veneer.ops.traced import is_tracing

DIAGONAL = "lora_diag"


@dataclass(frozen=True)
class KasaConfig:
    """Settings of KaSA, in PEFT's fields: the weights of what is added to the loss of a training run.

    ``beta`` weighs the squares of d, ``gamma`` the distance of A and B from orthogonal factors.
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        check(self, self._problems)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> KasaConfig:
        """Return the settings from a file's fields. Raises ConfigError for unknown ones."""
        return settings_of(cls, values)

    def _problems(self) -> list[str]:
        given = {"beta": self.beta, "gamma": self.gamma}
        return [f"{name}={value!r} must be at least 0" for name, value in given.items() if value < 0]


def too_large(sites: Sequence[LinearSite], ranks: Sequence[int]) -> list[str]:
    """Return a problem for each layer whose weight has no singular triplet left, or that is no linear layer."""
    found = [f"kasa_config at {site.name}, which is no linear layer" for site in sites if site.kind != "linear"]
    return found + [
        f"r={r} at {site.name} takes off every singular triplet of a weight of {site.out_features} x "
        f"{site.in_features}, with kasa_config: give at most {least - 1}"
        for site, r in zip(sites, ranks, strict=True)
        if r >= (least := min(site.out_features, site.in_features))
    ]


def least_parts(site: LinearSite, r: int) -> dict[str, Tensor]:
    """Return the pair whose product is the sum of the r least singular triplets of the weight, in float32."""
    if is_tracing():  # of a plan, before weights have values
        return {"least_A": torch.zeros(r, site.in_features), "least_B": torch.zeros(site.out_features, r)}
    u, s, v = torch.linalg.svd(needed_weight(site, "KaSA").dense(torch.float32).detach(), full_matrices=False)
    return {"least_A": v[-r:].clone(), "least_B": (u[:, -r:] * s[-r:]).contiguous()}


def taken_off(site: LinearSite, params: Params, added: Pair) -> LinearDelta:
    """Return the record that adds a pair with d in it, and takes the least triplets off."""
    d = params[DIAGONAL]
    held = params if "least_A" in params else least_parts(site, added.rank)
    a, b = (held[f"least_{factor}"].to(d.device, d.dtype) for factor in "AB")
    return LinearDelta(adds=(Pair(a=added.a, b=added.b, core=d, scale=added.scale), Pair(a=a, b=-b)))


@dataclass(frozen=True)
class KasaTraining:
    """KaSA's part in a run: what it adds to the loss."""

    config: KasaConfig

    def fields_for(self, n_steps: int) -> Mapping[str, object]:
        return {}

    def penalty(self, layers: Sequence[Params]) -> Tensor | None:
        beta, gamma = self.config.beta, self.config.gamma
        parts = [beta * params[DIAGONAL].square().sum() + gamma * _distance(params) for params in layers]
        return torch.stack(parts).sum() if parts and (beta or gamma) else None

    def schedule(self, layers: Mapping[str, Params]) -> None:
        return None


def _distance(params: Params) -> Tensor:
    """The distance of the rows of A, and of the columns of B, from orthonormal ones (eq. 11)."""
    a, b = params["lora_A"], params["lora_B"]
    one = torch.eye(len(a), dtype=a.dtype, device=a.device)
    total: Tensor = torch.linalg.matrix_norm(a @ a.T - one) + torch.linalg.matrix_norm(b.T @ b - one)
    return total
