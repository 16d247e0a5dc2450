"""VB-LoRA: ``W + B A``, both composed of vectors from one bank that all layers share (Li et al. 2024, arXiv:2405.15179,
section 3.2).

Each piece of A and B is a mixture of the k vectors with the largest logits. Their softmax is the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.patterns import below_one
from veneer.contract.shared import Shared
from veneer.contract.targets import FamilyTargets
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite

_ALL = {"target_modules": ("q", "k", "v", "out", "up", "down")}
_BANK = "vblora_vector_bank"


@dataclass(frozen=True, kw_only=True)
class VBLoRAConfig(LinearMethod):
    """Settings of VB-LoRA, with the names that PEFT gives them.

    ``num_vectors`` is the count of vectors in the bank. ``vector_length`` is their length, which divides the widths of
    each layer. ``topk`` of them are mixed. ``init_vector_bank_bound``: the bank starts uniform in ± this bound.
    ``init_logits_std`` is the standard deviation of the logits at the start. ``save_only_topk_weights``, a file from
    which training cannot go on, is not supported.
    """

    peft_type: ClassVar[str] = "VBLORA"
    identity_at_start: ClassVar[bool] = False
    headline: ClassVar[tuple[str, ...]] = ("r", "num_vectors", "vector_length", "topk", "target_modules")
    family_targets: ClassVar[FamilyTargets] = {
        **dict.fromkeys(("bart", "opt"), _ALL),
        "t5": {"target_modules": ("q", "k", "v", "o", "wi", "wo")},
        "mt5": {"target_modules": ("q", "k", "v", "o", "wi_0", "wi_1", "wo")},
        "deberta-v2": {"target_modules": ("query_proj", "key_proj", "value_proj", "dense")},
        **{family: LOW_RANK[family] for family in ("deberta", "gemma4", "nemotron_h")},
    }
    inert: ClassVar[frozenset[str]] = frozenset(
        {"r", "num_vectors", "vector_length", "vblora_dropout", "fan_in_fan_out", "bias", "save_only_topk_weights"}
        | {"init_vector_bank_bound", "init_logits_std"}
    )

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "vblora_only"] = "none"
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    def problems(self) -> list[str]:
        counts = {name: getattr(self, name) for name in ("r", "num_vectors", "vector_length", "topk")}
        found = super().problems() + below_one(counts)
        if self.topk > self.num_vectors:
            found.append(f"topk={self.topk!r} is above num_vectors={self.num_vectors!r}: give at most that many")
        if not 0 <= self.vblora_dropout < 1:
            found.append(f"vblora_dropout={self.vblora_dropout!r} must lie in [0, 1)")
        if self.save_only_topk_weights:
            found.append("save_only_topk_weights=True is not supported: save the adapter in PEFT with False")
        found += [
            f"{name}={value!r} must be at least 0"
            for name in ("init_vector_bank_bound", "init_logits_std")
            if (value := getattr(self, name)) < 0
        ]
        return found

    @property
    def checks(self) -> Checks:
        return _Checks(self.vector_length)

    @property
    def largest_rank(self) -> int:
        return self.r

    @property
    def dropout(self) -> float:
        return self.vblora_dropout

    @property
    def shared(self) -> Shared:
        return Shared(names=(_BANK,), is_held=True)

    def shapes(self, site: LinearSite) -> Shapes:
        size, n = self.vector_length, self.num_vectors
        return {
            "vblora_logits_A": (self.r, site.in_features // size, n),
            "vblora_logits_B": (site.out_features // size, self.r, n),
            _BANK: (n, size),
        }

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        shapes, bound = self.shapes(site), self.init_vector_bank_bound
        bank = torch.empty(shapes.pop(_BANK)).uniform_(-bound, bound, generator=generator)
        logits = {name: self.init_logits_std * torch.randn(s, generator=generator) for name, s in shapes.items()}
        return {**logits, _BANK: bank}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        a, b = (self._mixed(params[f"vblora_logits_{factor}"], params[_BANK]) for factor in "AB")
        return LinearDelta.pair(a.flatten(1), b.mT.flatten(0, 1))

    def site_of(self, site: LinearSite, shapes: Mapping[str, tuple[int, ...]]) -> LinearSite:
        size = shapes[_BANK][1]
        columns, rows = shapes["vblora_logits_A"][1], shapes["vblora_logits_B"][0]
        return replace(site, in_features=size * columns, out_features=size * rows)

    def _mixed(self, logits: Float[Tensor, "m n h"], bank: Float[Tensor, "h v"]) -> Float[Tensor, "m n v"]:
        """Return mixtures of the bank's vectors: of those with the k largest logits, weighted by the softmax of these
        logits.
        """
        largest, index = logits.topk(self.topk, dim=-1)
        return (largest.softmax(dim=-1).unsqueeze(-1) * bank[index]).sum(dim=-2)


@dataclass(frozen=True)
class _Checks(Checks):
    size: int

    def layers(self, sites: Sequence[LinearSite]) -> list[str]:
        """Return a problem for each layer whose widths are not multiples of the length of the bank's vectors."""
        return [
            f"vector_length={self.size} does not divide the {site.in_features} inputs and {site.out_features} outputs "
            f"of {site.name}: give a divisor of {math.gcd(site.in_features, site.out_features)}"
            for site in sites
            if site.in_features % self.size or site.out_features % self.size
        ]
