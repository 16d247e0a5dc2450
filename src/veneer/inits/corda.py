"""CorDA: the factors start as singular triplets of the weight, seen through the covariance C of a layer's inputs.

``W C = U S Vᵀ``, and ``scale · B A = U_r S_r V_rᵀ C⁻¹``. Source: Yang et al. 2024, arXiv:2406.05223, section 3. The
update subtracts the initial product, as PiSSA's does, so that the start is the base.

Difference from PEFT: PEFT takes one sequence a pass; here a batch of them is one sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.contract.settings import Settings
from veneer.inits import Factors, Start, dense_weight
from veneer.inits.lowrank import kaiming
from veneer.inits.pissa import best_factors
from veneer.records.sites import LinearSite

NAMES = ("'corda'",)
_OF_THE_PASS = (  # PEFT's settings of its pass over data, which leave nothing in an adapter
    "cache_file", "covariance_file", "verbose", "use_float16_for_covariance", "prune_temporary_fields",
)  # fmt: skip
_DAMPING, _LARGEST_ERROR = 0.01, 0.05  # of the inverse, as PEFT and the paper's code have them


def find(name: bool | str) -> Start | None:
    """Return the initialisation "corda"; None for another name. It is plain LoRA's until a pass over data gives the
    covariances.
    """
    return Start(kaiming, taken_off=True) if name == "corda" else None


@dataclass(frozen=True)
class CordaConfig(Settings):
    """Settings of CorDA, with PEFT's name for the field.

    ``corda_method``: "ipm" takes the r largest singular values, to adapt to the data's task. "kpm" takes the r
    smallest, to keep the knowledge that the data shows.
    """

    corda_method: Literal["ipm", "kpm"] = "ipm"

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> CordaConfig:
        """Return the settings from a file's fields. Fields that are about PEFT's own pass over data are ignored.

        Raises ConfigError for unknown fields.
        """
        return super().from_dict({name: value for name, value in values.items() if name not in _OF_THE_PASS})


def covariance(rows: Float[Tensor, "*batch i"]) -> Float[Tensor, "i i"]:
    """Return ``Xᵀ X`` of the inputs X in one pass, in float32, after dividing X by the magnitude of its largest value.

    As in PEFT, the largest value is found with its sign, not by magnitude; it must not be 0.
    """
    x = rows.flatten(0, -2).float()
    x = x / x.max().abs()
    return x.T @ x


def of_covariance(
    site: LinearSite, inputs: Float[Tensor, "i i"], shape: tuple[int, float], settings: CordaConfig
) -> Factors:
    """Return A (r, i) and B (o, r) in float32 on the CPU, from the mean covariance of a layer's inputs; ``shape`` is r
    and the scale of B A. Raises ConfigError if the frozen weight is not loaded.
    """
    r, scale = shape
    weight = dense_weight(site, r, "CorDA")
    damped, inverse = _inverted(inputs.to(weight.device))
    u, s, vt = torch.linalg.svd(weight @ damped, full_matrices=False)
    vt = vt @ inverse
    part = slice(r) if settings.corda_method == "ipm" else slice(len(s) - r, None)
    return best_factors(u[:, part], s[part], vt[part], scale)


def _inverted(inputs: Float[Tensor, "i i"]) -> tuple[Float[Tensor, "i i"], Float[Tensor, "i i"]]:
    """Return the damped covariance and its inverse. The damping is doubled until their product is within
    `_LARGEST_ERROR` of the identity.
    """
    eye, damping = torch.eye(len(inputs), device=inputs.device), _DAMPING
    while True:
        damped = inputs + damping * inputs.diagonal().mean() * eye
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < _LARGEST_ERROR:
            return damped, inverse
        damping *= 2
