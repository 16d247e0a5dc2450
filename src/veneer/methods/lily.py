"""Lily: ``W x + s Σₑ πₑ Bₑ A x``. Several layers share A, and all layers of a kind share the experts Bₑ (Zhong et al.
2024, arXiv:2407.09946).

The weights π of the experts are the mean, over the tokens of a sequence, of a softmax of ``R A x``. Difference from
PEFT: PEFT takes the mean over all tokens of a batch, padding too, so that a row depends on the other rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.known import Known
from veneer.contract.patterns import below_one
from veneer.contract.shared import Shared
from veneer.contract.targets import FamilyTargets
from veneer.inits.uniform import kaiming_uniform
from veneer.records.deltas import LinearDelta
from veneer.records.sequences import MEMBERS, means
from veneer.records.sites import LinearSite
from veneer.records.terms.mixture import LowRankMixture

_A, _B, _ROUTER = "lily_A", "lily_B", "lily_router"


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceMixture(LowRankMixture):
    """Change ``scale · Σₑ πₑ Bₑ A``, where π is the mean of ``softmax(router A x)`` over a sequence.

    ``b`` holds the experts (r, o), one below another. ``members`` says which tokens belong to which sequence, see
    `records.sequences.Sequences`. Without it, the last axis but one of the input is a sequence.
    """

    router: Float[Tensor, "e r"]
    b: Float[Tensor, "er o"]
    scale: float
    members: Float[Tensor, "tokens sequences"] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[1], self.a.shape[1]

    def outward(self, inner: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(inner.dtype, self.router.dtype)  # the router chooses, so it is not rounded
        chosen = linear(inner.to(wide), self.router.to(wide)).softmax(dim=-1)
        if self.members is None:
            shares = chosen.mean(dim=-2, keepdim=True)
        else:
            shares = means(chosen.flatten(0, -2), self.members).view_as(chosen)
        weighed = ((self.scale * shares)[..., None] * inner[..., None, :]).flatten(-2)
        return weighed.to(inner.dtype), self.b.to(inner.dtype)

    def on(self, rows: slice, n_before: int) -> SequenceMixture:
        return self if self.members is None else replace(self, members=self.members[rows])


@dataclass(frozen=True, kw_only=True)
class LilyConfig(LinearMethod):
    """Settings of Lily, with the names that PEFT gives them.

    ``stride_A`` layers of one kind, one after another, share an A. All layers of a kind share the ``num_B`` experts.
    Layers are of one kind if the same name in ``target_modules`` matches them and their weights have one shape.
    ``scaling`` is the scale s. ``init_weights`` starts B at zero; False draws it at random.
    ``groups`` is filled in when the adapter is attached. It names, for each layer, the first layer with its A and the
    first with its B.
    """

    peft_type: ClassVar[str] = "LILY"
    changes_weights: ClassVar[bool] = False
    headline: ClassVar[tuple[str, ...]] = ("r", "stride_A", "num_B", "scaling", "target_modules")
    outward: ClassVar[frozenset[str]] = frozenset({_B})
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    inert: ClassVar[frozenset[str]] = frozenset({"r", "stride_A", "num_B", "init_weights", "groups"})

    r: int = 32
    stride_A: int = 1  # noqa: N815 - PEFT's name
    num_B: int = 2  # noqa: N815 - PEFT's name
    scaling: float = 1.0
    init_weights: bool = True
    groups: Mapping[str, tuple[str, str]] | None = field(default=None, metadata={"on_disk": False})

    def problems(self) -> list[str]:
        found = super().problems() + below_one({"r": self.r, "stride_A": self.stride_A})
        return found + ([] if self.num_B >= 2 else [f"num_B={self.num_B!r} must be at least 2, for a router to choose"])

    @property
    def by_sequence(self) -> bool:
        return True

    @property
    def shared(self) -> Shared:
        return Shared(names=(_A, _B), is_held=True, group=self._group)

    def for_sites(self, sites: Sequence[LinearSite], known: Known) -> Self:
        kinds: dict[tuple[str, int, int], list[str]] = {}
        for site in sites:
            kinds.setdefault((self._name(site), site.out_features, site.in_features), []).append(site.name)
        groups = {
            path: (paths[place - place % self.stride_A], paths[0])
            for paths in kinds.values()
            for place, path in enumerate(paths)
        }
        return replace(self, groups=groups)

    def shapes(self, site: LinearSite) -> Shapes:
        r, n = self.r, self.num_B
        return {_A: (r, site.in_features), _B: (n * r, site.out_features), _ROUTER: (n, r)}

    def disk_names(self, site: LinearSite) -> dict[str, str]:
        return {name: f"{name}.weight" for name in self.shapes(site)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        found = {name: kaiming_uniform(shape, generator) for name, shape in self.shapes(site).items()}
        return found | ({_B: torch.zeros_like(found[_B])} if self.init_weights else {})

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        change = SequenceMixture(
            a=params[_A], router=params[_ROUTER], b=params[_B], scale=self.scaling, members=params.get(MEMBERS)
        )
        return LinearDelta(adds=(change,))

    def site_of(self, site: LinearSite, shapes: Mapping[str, tuple[int, ...]]) -> LinearSite:
        return replace(site, in_features=shapes[_A][1], out_features=shapes[_B][1])

    def _group(self, path: str, parameter: str) -> str:
        of_a, of_b = (self.groups or {}).get(path, (path, path))
        return of_a if parameter == _A else of_b

    def _name(self, site: LinearSite) -> str:
        """Return the entry of ``target_modules`` that matches a layer, the longest if several match. If
        ``target_modules`` is one regex, return the regex.
        """
        targets = self.target_modules or ()
        if isinstance(targets, str):
            return targets
        return max((name for name in targets if site.name.endswith(name)), key=len, default="")
