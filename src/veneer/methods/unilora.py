"""Uni-LoRA: ``W + B A``, where all entries of A and B of all layers come from one vector θ (Li et al. 2025,
arXiv:2506.00799, section 3).

Each entry is one of θ's numbers, chosen at random, divided by the root of the number of entries that use it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self
from weakref import WeakValueDictionary

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.known import Known
from veneer.contract.packing import Packing
from veneer.contract.patterns import below_one
from veneer.contract.peft_fields import PeftFields
from veneer.contract.places import Placed, ShapesByKey
from veneer.contract.shared import Shared
from veneer.contract.targets import FamilyTargets
from veneer.ops.traced import is_tracing
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite

_THETA = "unilora_theta_d"


class EntryChoice:
    """Index in θ of each entry of all layers' factors, and scale of each number of θ. Do not write to the tensors.

    Adapters of the same seed and size share this object. It is freed when the last of these adapters is gone.
    """

    def __init__(self, seed: int, length: int, count: int) -> None:
        self.index = balanced(seed, length, count)
        self.scale = torch.bincount(self.index, minlength=length).clamp_min(1).float().rsqrt()
        self._on = {torch.device("cpu"): (self.index, self.scale)}

    def on(self, device: torch.device) -> tuple[Int[Tensor, " count"], Float[Tensor, " length"]]:
        """Return the index of each entry and the scale of each number of θ, on a device."""
        if device not in self._on:
            self._on[device] = self.index.to(device), self.scale.to(device)
        return self._on[device]


_ALIVE: WeakValueDictionary[tuple[int, int, int], EntryChoice] = WeakValueDictionary()


def balanced(seed: int, length: int, count: int) -> Int[Tensor, " count"]:
    """Return a number below ``length`` for each of ``count`` entries, drawn as PEFT draws it.

    All numbers occur equally often, up to one time.
    """
    drawing = np.random.default_rng(seed)
    each, left = divmod(count, length)
    numbers = np.repeat(np.arange(length), each)
    if left:
        numbers = np.concatenate([numbers, drawing.choice(length, size=left, replace=False)])
    drawing.shuffle(numbers)
    return torch.as_tensor(numbers, dtype=torch.long)


@dataclass(frozen=True, kw_only=True)
class UniLoraConfig(LinearMethod):
    """Settings of Uni-LoRA, with the names that PEFT gives them.

    ``theta_d_length`` is the count of numbers in θ. ``proj_seed`` and the order of layers in the model decide which
    number of θ each entry of A and B is; ``save_indices`` writes this choice to the file. ``init_weights`` draws θ
    uniformly in ±``init_theta_d_bound``; False draws it from a normal distribution. Both change the model. ``first``
    (where each layer's entries begin) and ``count`` (of all entries) are filled in when the adapter is attached.
    """

    peft_type: ClassVar[str] = "UNILORA"
    identity_at_start: ClassVar[bool] = False
    headline: ClassVar[tuple[str, ...]] = ("r", "theta_d_length", "target_modules")
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    peft_fields: ClassVar[PeftFields] = PeftFields(quiet=("exclude_modules",))
    inert: ClassVar[frozenset[str]] = frozenset(
        {"theta_d_length", "unilora_dropout", "fan_in_fan_out", "bias", "init_theta_d_bound", "init_weights"}
        | {"save_indices", "first", "count"}
    )

    r: int = 4
    proj_seed: int = 42
    theta_d_length: int = 256
    unilora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "unilora_only"] = "none"
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False
    first: Mapping[str, int] | None = field(default=None, metadata={"on_disk": False})
    count: int | None = field(default=None, metadata={"on_disk": False})

    def problems(self) -> list[str]:
        found = super().problems() + below_one({"r": self.r, "theta_d_length": self.theta_d_length})
        if self.proj_seed < 0:
            found.append(f"proj_seed={self.proj_seed!r} must be a whole number of at least 0")
        if not 0 <= self.unilora_dropout < 1:
            found.append(f"unilora_dropout={self.unilora_dropout!r} must lie in [0, 1)")
        if self.init_theta_d_bound <= 0:
            found.append(f"init_theta_d_bound={self.init_theta_d_bound!r} must be above 0")
        return found

    @property
    def largest_rank(self) -> int:
        return self.r

    @property
    def dropout(self) -> float:
        return self.unilora_dropout

    @property
    def shared(self) -> Shared:
        return Shared(names=(_THETA,), is_held=True)

    @property
    def packing(self) -> Packing:
        if not self.save_indices:
            return Packing()
        index, scale = ([f"unilora_{what}_{factor}" for factor in "AB"] for what in ("indices", "scales"))
        return _Indices(fixed=(*index, *scale), whole=dict.fromkeys(index, torch.int64))

    def for_sites(self, sites: Sequence[LinearSite], known: Known) -> Self:
        first, count = {}, 0
        for site in sites:
            first[site.name] = count
            count += self._entries(site)
        return replace(self, first=first, count=count)

    def places_in(self, shapes: ShapesByKey, source: str) -> dict[str, Placed] | None:
        """Return None: the order of layers in the model, which a file does not hold, decides what an entry means."""
        return None

    def shapes(self, site: LinearSite) -> Shapes:
        a, b = (self.r, site.in_features), (site.out_features, self.r)
        found: Shapes = {_THETA: (self.theta_d_length,)}
        if not self.save_indices:
            return found
        return {**found, "unilora_indices_A": a, "unilora_indices_B": b, "unilora_scales_A": a, "unilora_scales_B": b}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        n, bound = self.theta_d_length, self.init_theta_d_bound
        if self.init_weights:
            theta = torch.empty(n).uniform_(-bound, bound, generator=generator)
        else:
            theta = torch.randn(n, generator=generator)
        if not self.save_indices:
            return {_THETA: theta}
        index, scale = self._choice(site, theta.device)
        indices = dict(zip(("unilora_indices_A", "unilora_indices_B"), self._apart(index, site), strict=True))
        scales = {name.replace("indices", "scales"): scale[each] for name, each in indices.items()}
        return {_THETA: theta, **{name: each.clone() for name, each in indices.items()}, **scales}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        theta = params[_THETA]
        if self.save_indices:
            a, b = (theta[params[f"unilora_indices_{x}"].long()] * params[f"unilora_scales_{x}"] for x in "AB")
        else:
            index, scale = self._choice(site, theta.device)
            a, b = self._apart((theta * scale.to(theta.dtype))[index], site)
        return LinearDelta.pair(a, b)

    def _entries(self, site: LinearSite) -> int:
        return self.r * (site.in_features + site.out_features)

    def _apart(self, entries: Tensor, site: LinearSite) -> tuple[Tensor, Tensor]:
        """Split the numbers ``entries`` of a layer into its A (r, i) and B (o, r)."""
        of_a = self.r * site.in_features
        return entries[:of_a].view(self.r, -1), entries[of_a:].view(-1, self.r)

    def _choice(self, site: LinearSite, device: torch.device) -> tuple[Int[Tensor, " n"], Float[Tensor, " length"]]:
        """Return the index in θ of each of a layer's entries, and a scale for each number of θ."""
        n = self._entries(site)
        if is_tracing():  # of a plan, before there are values
            return torch.zeros(n, dtype=torch.long, device=device), torch.zeros(self.theta_d_length, device=device)
        start, count = (self.first or {}).get(site.name, 0), self.count or n
        index, scale = self._held(count).on(device)
        return index[start : start + n], scale

    def _held(self, count: int) -> EntryChoice:
        """Return the indices and scales (`EntryChoice`) for ``count`` entries. They stay in memory as long as this
        config.
        """
        kept: dict[int, EntryChoice] = vars(self).setdefault("_kept", {})
        if count not in kept:
            key = self.proj_seed, self.theta_d_length, count
            kept[count] = _ALIVE.get(key) or _ALIVE.setdefault(key, EntryChoice(*key))
        return kept[count]


@dataclass(frozen=True)
class _Indices(Packing):
    """Packing that checks that the file's indices lie within θ."""

    def problems(self, site: LinearSite, params: Params) -> list[str]:
        length = len(params[_THETA])
        return [
            f"{name} of {site.name} holds indices outside θ: they must lie in 0 to {length - 1}"
            for name in self.whole
            if params[name].numel() and not 0 <= int(params[name].min()) <= int(params[name].max()) < length
        ]
