"""PEANuT: ``W + s B f(A W)``, f a small network on the columns of ``A W`` (Zhong et al. 2024, arXiv:2410.01870, eq. 4).

The update is a pair of rank r. Its second factor, ``f(A W)``, depends on the weight of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.needed import needed_weight
from veneer.contract.patterns import below_one
from veneer.contract.targets import FamilyTargets
from veneer.inits.uniform import kaiming_uniform
from veneer.records.deltas import LinearDelta
from veneer.records.residual import ACTIVATIONS
from veneer.records.sites import LinearSite

_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    **ACTIVATIONS,
    "leaky_relu": functional.leaky_relu,
    "mish": functional.mish,
    "linear": torch.clone,
}


@dataclass(frozen=True, kw_only=True)
class PeanutConfig(LinearMethod):
    """Settings of PEANuT, with the names that PEFT gives them.

    ``depth``: f has this many layers (r, r) that encode, and as many that decode. ``act_fn`` is the activation after
    each of them. The output of an encoding layer is added after the matching decoding layer. ``scaling`` is the scale
    s. ``init_weights`` starts B at zero. False draws B, so that the start changes the model.
    """

    peft_type: ClassVar[str] = "PEANUT"
    headline: ClassVar[tuple[str, ...]] = ("r", "depth", "scaling", "target_modules")
    outward: ClassVar[frozenset[str]] = frozenset({"peanut_B"})
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    inert: ClassVar[frozenset[str]] = frozenset({"r", "depth", "init_weights"})

    r: int = 32
    depth: int = 0
    act_fn: Literal["relu", "gelu", "gelu_new", "leaky_relu", "linear", "mish", "sigmoid", "silu", "swish", "tanh"] = (
        "relu"
    )
    scaling: float = 1.0
    init_weights: bool = True

    def problems(self) -> list[str]:
        found = super().problems() + below_one({"r": self.r})
        return found + ([f"depth={self.depth!r} must be a whole number of at least 0"] if self.depth < 0 else [])

    @property
    def largest_rank(self) -> int:
        return self.r

    @property
    def reads_weight(self) -> bool:
        return True

    def shapes(self, site: LinearSite) -> Shapes:
        o, r = site.out_features, self.r
        return {"peanut_A": (r, o), **dict.fromkeys(self._layers, (r, r)), "peanut_B": (o, r)}

    def disk_names(self, site: LinearSite) -> dict[str, str]:
        return {name: f"{name.replace('-', '.')}.weight" for name in self.shapes(site)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        found = {name: kaiming_uniform(shape, generator) for name, shape in self.shapes(site).items()}
        return found | ({"peanut_B": torch.zeros_like(found["peanut_B"])} if self.init_weights else {})

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        projected = needed_weight(site, "PEANuT").matmul_t(params["peanut_A"]).to(params["peanut_A"].dtype)
        return LinearDelta.pair(self._network(projected, params), params["peanut_B"], scale=self.scaling)

    @property
    def _layers(self) -> list[str]:
        return [f"peanut_{part}-{k}" for part in ("encoders", "decoders") for k in range(self.depth)]

    def _network(self, x: Float[Tensor, "r i"], params: Params) -> Float[Tensor, "r i"]:
        act = _FUNCTIONS[self.act_fn]
        h, encoded = act(x), []
        for k in range(self.depth):
            encoded.append(h)
            h = act(params[f"peanut_encoders-{k}"] @ h)
        for k in range(self.depth):
            h = act(params[f"peanut_decoders-{k}"] @ h) + encoded.pop()
        return h
