"""Arrow: saved LoRAs mixed for each token, by the direction that each of them amplifies most (Ostapenko et al. 2024,
arXiv:2405.11157, section 3.2).

``W x + Σₑ wₑ sₑ Bₑ Aₑ x``, w a softmax of ``|pₑ · x|`` over the k largest, p the first right singular vector of B A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.packing import Packing
from veneer.contract.patterns import below_one
from veneer.inits.uniform import kaiming_uniform
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite
from veneer.records.terms.mixture import Mixture

_A, _B, _SCALES, _PROTOTYPES = "arrow_A", "arrow_B", "arrow_scales", "arrow_prototypes"
_ITERATIONS, _LEAST = 15, 1e-8  # PEFT's


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMixture(Mixture):
    """Change ``Σₑ wₑ sₑ Bₑ Aₑ`` for each token x. w is a softmax of ``|pₑ · x| / temperature`` over the ``top_k``
    largest; the other weights are 0.
    """

    a: Float[Tensor, "e r i"]
    b: Float[Tensor, "e o r"]
    scales: Float[Tensor, " e"]
    prototypes: Float[Tensor, "e i"]
    top_k: int
    temperature: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[1], self.a.shape[2]

    def matmul(self, x: Tensor) -> Tensor:
        nearest, index = linear(x, self.prototypes.to(x.dtype)).abs().topk(self.top_k, dim=-1)
        weights = (nearest / self.temperature).softmax(dim=-1) * self.scales.to(x.dtype)[index]
        weights = torch.zeros_like(x[..., :1]).expand(*x.shape[:-1], len(self.a)).scatter(-1, index, weights)
        inner = linear(x, self.a.flatten(0, 1).to(x.dtype)).view(*weights.shape, self.a.shape[1])
        together = self.b.transpose(0, 1).flatten(1)  # the experts side by side, (o, e r)
        return linear((inner * weights[..., None]).flatten(-2), together.to(x.dtype))


@dataclass(frozen=True, kw_only=True)
class ArrowConfig(LinearMethod):
    """Settings of Arrow, with the names that PEFT gives them.

    ``top_k`` pairs act on a token, weighted by a softmax of temperature ``router_temperature``. `create_arrow_model`
    fills in ``n_experts``, the number of pairs, and their rank ``r``. In a config that was made otherwise,
    ``n_experts`` is ``top_k``. ``use_gks`` subtracts the mean of general adapters from each pair. ``rng_seed`` seeds
    the search for prototypes, as in PEFT. An adapter without saved LoRAs has a random A and a zero B.
    """

    peft_type: ClassVar[str] = "ARROW"
    changes_weights: ClassVar[bool] = False
    headline: ClassVar[tuple[str, ...]] = ("top_k", "n_experts", "r", "target_modules")
    outward: ClassVar[frozenset[str]] = frozenset({_B})
    inert: ClassVar[frozenset[str]] = frozenset({"r", "n_experts", "use_gks", "rng_seed"})

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    rng_seed: int | None = None
    r: int = 8
    n_experts: int | None = None

    def problems(self) -> list[str]:
        found = super().problems() + below_one({"top_k": self.top_k, "r": self.r})
        if self.router_temperature <= 0:
            found.append(f"router_temperature={self.router_temperature!r} must be above 0")
        if self.n_experts is not None and self.n_experts < self.top_k:
            found.append(f"top_k={self.top_k!r} is above the {self.n_experts} adapters: give at most that many")
        return found

    @property
    def input_dependent(self) -> bool:
        return True

    @property
    def packing(self) -> Packing:
        return Packing(fixed=(_SCALES, _PROTOTYPES))

    def shapes(self, site: LinearSite) -> Shapes:
        e, o, i = self.n_experts or self.top_k, site.out_features, site.in_features
        return {_A: (e, self.r, i), _B: (e, o, self.r), _SCALES: (e,), _PROTOTYPES: (e, i)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        (e, r, i), b, _, _ = self.shapes(site).values()
        a = kaiming_uniform((e * r, i), generator).view(e, r, i)
        directions = [amplified(each, torch.eye(r), seed=self.rng_seed, generator=generator) for each in a]
        return {_A: a, _B: torch.zeros(b), _SCALES: torch.ones(e), _PROTOTYPES: torch.stack(directions)}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        change = TokenMixture(
            a=params[_A],
            b=params[_B],
            scales=params[_SCALES],
            prototypes=params[_PROTOTYPES],
            top_k=self.top_k,
            temperature=self.router_temperature,
        )
        return LinearDelta(adds=(change,))

    def site_of(self, site: LinearSite, shapes: Mapping[str, tuple[int, ...]]) -> LinearSite:
        return replace(site, in_features=shapes[_A][2], out_features=shapes[_B][1])


def of_experts(
    a: Float[Tensor, "e r i"], b: Float[Tensor, "e o r"], scales: Float[Tensor, " e"], seed: int | None
) -> dict[str, Tensor]:
    """Return the parameters of a layer, given the pairs of the saved adapters and their scales. ``seed`` is that of
    `amplified`.
    """
    directions = [amplified(one, other, seed=seed) for one, other in zip(a, b, strict=True)]
    return {_A: a, _B: b, _SCALES: scales, _PROTOTYPES: torch.stack(directions)}


def amplified(
    a: Float[Tensor, "r i"],
    b: Float[Tensor, "o r"],
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " i"]:
    """Return the first right singular vector of ``B A``, in float32, as PEFT approximates it.

    It is found by 15 steps of power iteration from a random vector, drawn by ``seed``, or by ``generator`` if ``seed``
    is None.
    """
    a, b = a.float(), b.float()
    if seed is not None:
        generator = torch.Generator(a.device).manual_seed(seed)
    v: Tensor = torch.randn(a.shape[1], generator=generator, device=a.device)
    v, inner = v / (v.norm() + _LEAST), b.T @ b
    for _ in range(_ITERATIONS):
        v = a.T @ (inner @ (a @ v))
        v = v / (v.norm() + _LEAST)
    return v
