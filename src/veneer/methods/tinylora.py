"""TinyLoRA: ``W + B (Σ vₖ Pₖ) A``, a few numbers v trained (Morris et al. 2026, arXiv:2602.04118).

A and B are the r largest parts of W's singular value decomposition, each with the root of the singular values. P are
random matrices (r, r). Layers may share v.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.known import Known
from veneer.contract.packing import Packing
from veneer.contract.patterns import below_one
from veneer.contract.peft_fields import PeftFields
from veneer.contract.places import Placed, ShapesByKey
from veneer.contract.seeds import no_seeds
from veneer.contract.shared import Shared
from veneer.contract.targets import FamilyTargets
from veneer.ops.traced import is_tracing
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite


@dataclass(frozen=True, kw_only=True)
class TinyLoraConfig(LinearMethod):
    """Settings of TinyLoRA, with the names that PEFT gives them.

    ``r`` is the rank of the fixed factors A and B, and ``u`` the count of the trained numbers v of a layer.
    ``weight_tying`` is the share of layers that reuse another layer's v: with 0 every layer has its own, with 1 all
    layers share one. The random matrices P are drawn from ``projection_seed`` plus the layer's index;
    ``save_projection`` writes them. ``init_weights``: True starts v at zero, "uniform" (False is the same) draws it in
    ±``init_v_bound``, so that the start changes the model.
    ``order`` (the index of each adapted layer) is filled in when the adapter is attached.
    """

    peft_type: ClassVar[str] = "TINYLORA"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding"})
    headline: ClassVar[tuple[str, ...]] = ("r", "u", "weight_tying", "target_modules")
    family_targets: ClassVar[FamilyTargets] = LOW_RANK
    usual_learning_rate: ClassVar[float] = 5e-3
    peft_fields: ClassVar[PeftFields] = PeftFields(quiet=("exclude_modules",))
    inert: ClassVar[frozenset[str]] = frozenset(
        {"r", "u", "save_projection", "init_v_bound", "tinylora_dropout", "fan_in_fan_out", "bias", "init_weights"}
        | {"order"}
    )

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "tinylora_only"] = "none"
    init_weights: bool | Literal["uniform"] = True
    order: Mapping[str, int] | None = field(default=None, metadata={"on_disk": False})

    def problems(self) -> list[str]:
        found = super().problems() + below_one({"r": self.r, "u": self.u})
        found += no_seeds({"projection_seed": self.projection_seed})
        if not 0 <= self.weight_tying <= 1:
            found.append(f"weight_tying={self.weight_tying!r} must lie in [0, 1]")
        if not 0 <= self.tinylora_dropout < 1:
            found.append(f"tinylora_dropout={self.tinylora_dropout!r} must lie in [0, 1)")
        if self.init_v_bound < 0:
            found.append(f"init_v_bound={self.init_v_bound!r} must be at least 0")
        return found

    @property
    def largest_rank(self) -> int:
        return self.r

    @property
    def dropout(self) -> float:
        return self.tinylora_dropout

    @property
    def shared(self) -> Shared:
        return Shared(names=("tinylora_v",), is_held=True)

    @property
    def packing(self) -> Packing:
        return Packing(fixed=("tinylora_A", "tinylora_B", *(["tinylora_P"] if self.save_projection else [])))

    def for_sites(self, sites: Sequence[LinearSite], known: Known) -> Self:
        return replace(self, order={site.name: index for index, site in enumerate(sites)})

    def places_in(self, shapes: ShapesByKey, source: str) -> dict[str, Placed] | None:
        """Return None: the order of layers in the model, which a file does not hold, decides which layers share v and
        how P is drawn.
        """
        return None

    def group(self, site: LinearSite) -> int:
        """Return the index of the vector v that a layer uses, counted as in PEFT."""
        n = len(self.order or ()) or 1
        n_groups = max(1, round(n * (1 - self.weight_tying)))
        return min(self._index(site) // max(1, n // n_groups), n_groups - 1)

    def shapes(self, site: LinearSite) -> Shapes:
        o, i = (site.out_features, site.in_features) if site.kind == "linear" else (site.in_features, site.out_features)
        r = min(self.r, o, i)
        found: Shapes = {"tinylora_v": (self.u,), "tinylora_A": (r, i), "tinylora_B": (o, r)}
        return {**found, "tinylora_P": (self.u, r, r)} if self.save_projection else found

    def disk_names(self, site: LinearSite) -> dict[str, str]:
        return {name: name for name in self.shapes(site)} | {"tinylora_v": f"tinylora_v.{self.group(site)}"}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        shapes, bound = self.shapes(site), 0.0 if self.init_weights is True else self.init_v_bound
        v = torch.empty(self.u).uniform_(-bound, bound, generator=generator)
        a, b = (torch.zeros(shapes[f"tinylora_{factor}"]) for factor in "AB")
        if site.weight is not None and not is_tracing():
            a, b = largest_parts(site.weight.dense(torch.float32).detach(), len(a), is_table=site.kind == "embedding")
        found = {"tinylora_v": v, "tinylora_A": a, "tinylora_B": b}
        if not self.save_projection:
            return found
        return {**found, "tinylora_P": self._projections(site, len(a), v.device).clone()}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        v, a, b = (params[f"tinylora_{name}"] for name in "vAB")
        p = params["tinylora_P"] if self.save_projection else self._projections(site, len(a), v.device)
        inner = torch.einsum("k,kij->ij", v, p.to(v.dtype))
        if site.kind == "embedding":  # A and B are those of the table, which is the transposed weight
            return LinearDelta.pair(b.T, a.T @ inner.T)
        return LinearDelta.pair(a, b @ inner)

    def _index(self, site: LinearSite) -> int:
        return (self.order or {}).get(site.name, 0)

    def _projections(self, site: LinearSite, r: int, device: torch.device) -> Float[Tensor, "u r r"]:
        if is_tracing():
            return torch.zeros(self.u, r, r, device=device)
        return projections(self.projection_seed + self._index(site), self.u, r, device=device)


def largest_parts(
    w: Float[Tensor, "o i"], r: int, *, is_table: bool
) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
    """Return A and B with ``B A`` the best approximation of rank r of a weight. If ``is_table``, the best approximation
    of its transpose.
    """
    u, s, v = torch.linalg.svd(w.T if is_table else w, full_matrices=False)
    root = s[:r].sqrt()
    return (root[:, None] * v[:r]).cpu().contiguous(), (u[:, :r] * root).cpu().contiguous()


@functools.lru_cache(maxsize=1024)
def projections(seed: int, u: int, r: int, *, device: torch.device) -> Float[Tensor, "u r r"]:
    """Return P, drawn on the CPU as PEFT draws it. The result is shared: do not write to it."""
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(seed)
        return torch.normal(0.0, 1 / r**0.5, (u, r, r), generator=generator, device="cpu").to(device)
