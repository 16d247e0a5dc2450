"""OSF: the smallest singular triplets of W are trained, ``W + U diag(s) V - U₀ diag(s₀) V₀`` (Nayak et al. 2025,
arXiv:2504.07097, section 3).

The gradients of U and V are made orthogonal to the singular vectors that stay fixed, so that training does not change
the weight along these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks
from veneer.contract.needed import needed_weight
from veneer.contract.patterns import broken
from veneer.contract.peft_fields import PeftFields
from veneer.contract.targets import FamilyTargets
from veneer.ops.traced import is_tracing
from veneer.records.deltas import LinearDelta
from veneer.records.frozen import FrozenWeight
from veneer.records.sites import LinearSite
from veneer.records.terms.change import Change

_JOINED = {"target_modules": ("query_key_value", "dense_4h_to_h")}
_LOW = ("U_low", "S_low", "V_low")


@dataclass(frozen=True, slots=True, kw_only=True)
class Triplets(Change):
    """Change ``U diag(s) V - U₀ diag(s₀) V₀``."""

    u: Float[Tensor, "o k"]
    s: Float[Tensor, " k"]
    v: Float[Tensor, "k i"]
    u_start: Float[Tensor, "o k"]
    s_start: Float[Tensor, " k"]
    v_start: Float[Tensor, "k i"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.u.shape[0], self.v.shape[1]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        a, b = self._factors(dtype or self.dtype)
        return b @ a

    def matmul(self, x: Tensor) -> Tensor:
        a, b = self._factors(x.dtype)
        return (x @ a.T) @ b.T

    def matmul_t(self, dy: Tensor) -> Tensor:
        a, b = self._factors(dy.dtype)
        return (dy @ b) @ a

    def _factors(self, dtype: torch.dtype) -> tuple[Float[Tensor, "m i"], Float[Tensor, "o m"]]:
        """Return the two factors of the change. In 16 bits they have another form, so that small differences are not
        lost to rounding.

        The 16-bit form is ``(U - U₀) diag(s) V + U₀ (diag(s) V - diag(s₀) V₀)``.
        """
        if dtype.itemsize > 2:
            b = torch.cat([self.u * self.s, -self.u_start * self.s_start], dim=1)
            return torch.cat([self.v, self.v_start]).to(dtype), b.to(dtype)
        a = torch.cat([self.v, self.s[:, None] * self.v - self.s_start[:, None] * self.v_start])
        return a.to(dtype), torch.cat([(self.u - self.u_start) * self.s, self.u_start], dim=1).to(dtype)

    def rounded(self, dtype: torch.dtype) -> Triplets:
        return self  # rounded one by one, its factors would lose their differences


@dataclass(frozen=True, kw_only=True)
class OSFConfig(LinearMethod):
    """Settings of OSF, with the names that PEFT gives them.

    ``effective_rank``: how many singular triplets of each weight stay fixed, as a number or a share of the smaller
    width; None means half of that width. All others are trained. ``rank_pattern`` overrides it for layers whose path
    contains the key, a regular expression. ``init_weights=False`` draws the trained values at random, so that the start
    changes the model.
    """

    peft_type: ClassVar[str] = "OSF"
    headline: ClassVar[tuple[str, ...]] = ("effective_rank", "target_modules")
    default_targets: ClassVar[tuple[str, ...]] = ("q", "k", "v", "o", "gate", "up", "down")
    takes_any_linear: ClassVar[bool] = True
    family_targets: ClassVar[FamilyTargets] = {
        **{key: {"target_modules": ("c_attn", "c_proj")} for key in ("gpt2", "gpt_bigcode")},
        **dict.fromkeys(("bloom", "gpt_neox", "falcon"), _JOINED),
    }
    peft_fields: ClassVar[PeftFields] = PeftFields(
        neutral={"target_svd_config": None},
        unread=("target_svd_config",),
        quiet=("exclude_modules", "layers_to_transform", "layers_pattern"),
    )
    inert: ClassVar[frozenset[str]] = frozenset({"effective_rank", "rank_pattern", "init_weights"})

    effective_rank: int | float | None = None
    rank_pattern: Mapping[str, int | float] | None = None
    init_weights: bool | None = True

    def problems(self) -> list[str]:
        found = super().problems() + broken({"rank_pattern": self.rank_pattern or {}})
        patterned = {f"rank_pattern[{key!r}]": rank for key, rank in (self.rank_pattern or {}).items()}
        return found + [
            f"{name}={rank!r} must be a whole number of at least 1, or a share above 0 and at most 1"
            for name, rank in {"effective_rank": self.effective_rank, **patterned}.items()
            if rank is not None and rank <= 0
        ]

    @property
    def checks(self) -> Checks:
        return _Checks(self)

    @property
    def reads_weight(self) -> bool:
        return True

    def kept(self, site: LinearSite) -> int:
        """Return the number of singular triplets of a layer that stay fixed."""
        least = min(site.out_features, site.in_features)
        own = (rank for key, rank in (self.rank_pattern or {}).items() if re.search(key, site.name))
        given = next(own, self.effective_rank)
        if given is None:
            return least // 2
        is_share = isinstance(given, float) and given <= 1
        return min(least, int(least * given) if is_share else int(given))

    def shapes(self, site: LinearSite) -> Shapes:
        k = min(site.out_features, site.in_features) - self.kept(site)
        return {"U_low": (site.out_features, k), "S_low": (k,), "V_low": (k, site.in_features)}

    def disk_names(self, site: LinearSite) -> dict[str, str]:
        return {name: f"osf_svd_params.{name}" for name in _LOW}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        shapes = self.shapes(site)
        if self.init_weights is False:
            return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        if is_tracing() or site.weight is None:  # of a plan, before weights have values
            return {name: torch.zeros(shape) for name, shape in shapes.items()}
        found = divided(site.weight, self.kept(site))
        return {name: found[name].cpu() for name in shapes}

    def derived(self, site: LinearSite, params: Params) -> dict[str, Tensor]:
        """Return the initial values of the trained triplets, and the fixed vectors to which gradients are made
        orthogonal.

        The fixed vectors of U are returned only if o > i, those of V only if i > o. Otherwise they are not needed:
        trained and fixed vectors together are a basis, so gradients are projected onto the span of the trained ones.
        """
        o, i, kept = site.out_features, site.in_features, self.kept(site)
        if is_tracing():
            found = {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
            found |= {"U_high": torch.zeros(o, kept), "V_high": torch.zeros(kept, i)}
        else:
            found = divided(needed_weight(site, "OSF"), kept)
        needed = [*_LOW, *(["U_high"] if o > i else ["V_high"] if i > o else [])]
        return {_start(name): found[name] for name in needed}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        u, s, v = (params[name] for name in _LOW)
        held = params if _start("U_low") in params else self.derived(site, params)
        own = {name for name in held if name.endswith("_start")}
        starts = {name.removesuffix("_start"): held[name].to(u.device, u.dtype) for name in own}
        u = projected(u, starts["U_low"], starts.get("U_high"))
        v = projected(v.T, starts["V_low"].T, starts["V_high"].T if "V_high" in starts else None).T
        fixed = dict(zip(("u_start", "s_start", "v_start"), (starts[name] for name in _LOW), strict=True))
        return LinearDelta(adds=(Triplets(u=u, s=s, v=v, **fixed),))

    def site_of(self, site: LinearSite, shapes: Mapping[str, tuple[int, ...]]) -> LinearSite:
        return replace(site, out_features=shapes["U_low"][0], in_features=shapes["V_low"][1])


@dataclass(frozen=True)
class _Checks(Checks):
    config: OSFConfig

    def layers(self, sites: Sequence[LinearSite]) -> list[str]:
        """Return a problem for each layer in which no triplet is kept, or none is trained."""
        least = {site.name: min(site.out_features, site.in_features) for site in sites}
        kept = {site.name: self.config.kept(site) for site in sites}
        return [
            f"{name} has one singular triplet, and OSF needs two: list it in exclude_modules"
            if n == 1
            else f"effective_rank keeps {kept[name]} of the {n} singular triplets of {name}: give a rank from 1 to "
            f"{n - 1} (rank_pattern sets it for single modules)"
            for name, n in least.items()
            if not 0 < kept[name] < n
        ]

    def effect(self, names: Sequence[str], sites: Sequence[LinearSite]) -> list[str]:
        return [
            f"rank_pattern key {key!r} is found in none of the {len(names)} modules adapted, such as {names[0]!r}"
            for key in self.config.rank_pattern or {}
            if not any(re.search(key, name) for name in names)
        ]


def divided(weight: FrozenWeight, kept: int) -> dict[str, Tensor]:
    """Split the singular triplets of a weight, in float32: the first ones are fixed, the others trained.

    No two of the tensors share memory.
    """
    u, s, v = torch.linalg.svd(weight.dense(torch.float32).detach(), full_matrices=False)
    high = {"U_high": u[:, :kept], "V_high": v[:kept]}
    found = {**high, "U_low": u[:, kept:], "S_low": s[kept:], "V_low": v[kept:]}
    return {name: part.clone(memory_format=torch.contiguous_format) for name, part in found.items()}


def projected(
    x: Float[Tensor, "n k"], low: Float[Tensor, "n k"], high: Float[Tensor, "n m"] | None
) -> Float[Tensor, "n k"]:
    """Return x, and make its gradient orthogonal to the columns of ``high`` in the backward pass.

    If ``high`` is None, the gradient is projected onto the span of ``low``, the complement.
    """
    made: Tensor = _Projected.apply(x, low, high)  # type: ignore[no-untyped-call]
    return made


class _Projected(torch.autograd.Function):
    """Autograd function: the identity, whose gradient is made orthogonal to ``high``.

    If ``high`` is None, the gradient is projected onto the span of ``low``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor | None) -> Tensor:
        ctx.low, ctx.high = low, high
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        low, high, g = ctx.low, ctx.high, grads[0]
        return low @ (low.T @ g) if high is None else g - high @ (high.T @ g), None, None


def _start(name: str) -> str:
    return f"{name}_start"
