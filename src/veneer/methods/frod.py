"""FRoD: ``U (diag(l) + S) Vᵀ`` replaces W; layers of a kind share V; l and a sparse S are trained (AAAI 2026,
doi.org/10.1609/aaai.v40i31.39813, section 3).

V comes from a joint decomposition of the weights of all layers of a kind, such as all ``q_proj``. U and the first l are
chosen so that ``W = U diag(l) Vᵀ``. The change of the weight is then ``U (diag(l - l₀) + S) Vᵀ``, of full rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.needed import needed_weight
from veneer.contract.packing import Packing
from veneer.contract.peft_fields import PeftFields
from veneer.contract.rates import no_rates
from veneer.contract.seeds import no_seeds
from veneer.contract.shared import Shared
from veneer.contract.targets import FamilyTargets
from veneer.ops.traced import is_tracing
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite
from veneer.records.terms.change import Change

_LEAST_NORM = 1e-12  # PEFT's, of a column of U that is divided by its norm
_SHARED = ("frod_V", "frod_s_indices", "frod_s_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class InBasis(Change):
    """Change ``U (diag(d) + S) Vᵀ``, S (i, i) with ``values`` at ``rows`` and ``columns``."""

    diagonal: Float[Tensor, " i"]
    values: Float[Tensor, " n"]
    rows: Int[Tensor, " n"]
    columns: Int[Tensor, " n"]
    u: Float[Tensor, "o i"]
    v: Float[Tensor, "i i"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.u.shape[0], self.u.shape[1]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype, n = dtype or self.dtype, len(self.v)
        flat = torch.diag_embed(self.diagonal.to(dtype)).flatten()
        inner = flat.index_add(0, self.rows * n + self.columns, self.values.to(dtype)).view(n, n)
        return self.u.to(dtype) @ inner @ self.v.to(dtype).T

    def matmul(self, x: Tensor) -> Tensor:
        return self._through(x @ self.v.to(x.dtype), self.rows, self.columns) @ self.u.to(x.dtype).T

    def matmul_t(self, dy: Tensor) -> Tensor:
        return self._through(dy @ self.u.to(dy.dtype), self.columns, self.rows) @ self.v.to(dy.dtype).T

    def _through(self, h: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        taken = h[..., columns] * self.values.to(h.dtype)
        return (h * self.diagonal.to(h.dtype)).index_add(-1, rows, taken)


@dataclass(frozen=True, kw_only=True)
class FrodConfig(LinearMethod):
    """Settings of FRoD, with the names that PEFT gives them.

    ``sparse_rate`` is the share of the entries of S that are trained, at places drawn from ``projection_prng_key``.
    ``regularization_alpha`` stabilizes the decomposition. The file holds V and the places: ``save_projection=False`` is
    not supported. ``frod_dropout``: probability in training of zeroing an input of the change.
    """

    peft_type: ClassVar[str] = "FROD"
    headline: ClassVar[tuple[str, ...]] = ("sparse_rate", "target_modules")
    family_targets: ClassVar[FamilyTargets] = {name: names for name, names in LOW_RANK.items() if name != "phi"}
    peft_fields: ClassVar[PeftFields] = PeftFields(
        neutral={"progressbar": True, "runtime_offload_base_weight": False},
        unread=("progressbar",),
        quiet=("exclude_modules",),
    )
    inert: ClassVar[frozenset[str]] = frozenset(
        {"projection_prng_key", "save_projection", "frod_dropout", "fan_in_fan_out", "bias", "init_weights"}
        | {"sparse_rate", "regularization_alpha"}
    )

    projection_prng_key: int = 0
    save_projection: bool = True
    frod_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "frod_only"] = "none"
    init_weights: bool = True
    sparse_rate: float = 0.01
    regularization_alpha: float = 1e-3

    def problems(self) -> list[str]:
        found = super().problems() + no_seeds({"projection_prng_key": self.projection_prng_key})
        if not 0 <= self.sparse_rate <= 1:
            found.append(f"sparse_rate={self.sparse_rate!r} must lie in [0, 1]")
        if self.regularization_alpha <= 0:
            found.append(f"regularization_alpha={self.regularization_alpha!r} must be above 0")
        if not self.save_projection:
            found.append(
                "save_projection=False is not supported, because the file always holds V: leave save_projection at True"
            )
        return found + no_rates(self, "frod_dropout")

    @property
    def dropout(self) -> float:
        return self.frod_dropout

    @property
    def checks(self) -> Checks:
        return _Checks()

    @property
    def reads_weight(self) -> bool:
        return True

    @property
    def packing(self) -> Packing:
        return _Places(fixed=_SHARED, whole=dict.fromkeys(_SHARED[1:], torch.int64))

    @property
    def shared(self) -> Shared:
        return Shared(names=_SHARED, is_held=True)

    def shapes(self, site: LinearSite) -> Shapes:
        i, n = site.in_features, self._places(site.in_features)
        return {
            "frod_lambda_l": (i,),
            "frod_lambda_s_values": (n,),
            "frod_V": (i, i),
            "frod_s_indices": (2, n),
            "frod_s_size": (2,),
        }

    def disk_names(self, site: LinearSite) -> dict[str, str]:
        return {name: f"{name}.{kind_of(site.name)}" if name in _SHARED else name for name in self.shapes(site)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return dict(self.init_together({site.name: site}, generator)[site.name])

    def init_together(
        self, sites: Mapping[str, LinearSite], generator: torch.Generator | None = None
    ) -> dict[str, Params]:
        by_kind: dict[str, dict[int, LinearSite]] = {}
        for order, (path, site) in enumerate(sites.items()):  # of two in one block, the last counts, as in PEFT
            by_kind.setdefault(kind_of(path), {})[block_of(path, order)] = site
        drawing = torch.Generator().manual_seed(self.projection_prng_key)
        shared = {}
        for kind, blocks in sorted(by_kind.items()):
            of_kind = [site for _, site in sorted(blocks.items())]
            shared[kind] = self._basis(of_kind), self._drawn(of_kind[0].in_features, drawing)
        return {path: self._start(site, *shared[kind_of(path)], generator) for path, site in sites.items()}

    def derived(self, site: LinearSite, params: Params) -> dict[str, Tensor]:
        if is_tracing():  # of a plan, before weights have values
            return {"U": torch.empty(site.out_features, site.in_features), "l0": torch.empty(site.in_features)}
        u, norms = _in_basis(needed_weight(site, "FRoD").dense(torch.float64), params["frod_V"])
        return {"U": u, "l0": norms}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        found = params if "U" in params else self.derived(site, params)
        trained = params["frod_lambda_l"]
        u, first, v = (x.to(trained.device, trained.dtype) for x in (found["U"], found["l0"], params["frod_V"]))
        rows, columns = params["frod_s_indices"].long()
        values = params["frod_lambda_s_values"]
        change = InBasis(diagonal=trained - first, values=values, rows=rows, columns=columns, u=u, v=v)
        return LinearDelta(adds=(change,))

    def _places(self, n: int) -> int:
        """Return the number of trained entries of S (n, n), all off the diagonal."""
        most = n * n - n
        return max(min(int(n * n * self.sparse_rate), most), 1 if self.sparse_rate > 0 and most else 0)

    def _drawn(self, n: int, generator: torch.Generator) -> Int[Tensor, "2 n_places"]:
        """Draw the places of S's trained entries as PEFT does: n_places of the entries off the diagonal, which are
        numbered row by row.
        """
        count = self._places(n)
        if count == 0:
            return torch.empty(2, 0, dtype=torch.long)
        places = torch.randperm(n * n - n, generator=generator, device="cpu")[:count]
        rows, left = places // (n - 1), places % (n - 1)
        return torch.stack([rows, left + (left >= rows)])

    def _basis(self, sites: list[LinearSite]) -> Float[Tensor, "i i"]:
        """Return V of these layers' weights, or the identity when planning, before the weights have values."""
        if is_tracing() or any(site.weight is None for site in sites):
            return torch.eye(sites[0].in_features)
        weights = [site.weight.dense(torch.float32).detach().cpu() for site in sites if site.weight is not None]
        return joint_basis(weights, self.regularization_alpha)

    def _start(
        self, site: LinearSite, v: Tensor, places: Tensor, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        n, values = site.in_features, torch.zeros(places.shape[1])
        if is_tracing() or site.weight is None:
            norms = torch.ones(n)
        else:
            norms = _in_basis(site.weight.dense(torch.float64).detach().cpu(), v)[1]
        if not self.init_weights:
            values = 0.1 * torch.randn(len(values), generator=generator)
            norms = norms + 0.1 * torch.randn(n, generator=generator)
        size = torch.tensor([n, n])
        return dict(zip(self.shapes(site), (norms, values, v.clone(), places, size), strict=True))


class _Checks(Checks):
    def layers(self, sites: Sequence[LinearSite]) -> list[str]:
        """Return a problem for each layer whose number of inputs differs from the first layer of its kind. Layers of
        one kind share V.
        """
        first: dict[str, LinearSite] = {}
        for site in sites:
            first.setdefault(kind_of(site.name), site)
        return [
            f"{site.name} has {site.in_features} inputs, and {other.name} has {other.in_features}: layers of one kind "
            "share a basis and need one width. Name layers of one width in target_modules"
            for site in sites
            if (other := first[kind_of(site.name)]).in_features != site.in_features
        ]


@dataclass(frozen=True)
class _Places(Packing):
    """Packing that checks that the file's places of trained entries lie within S."""

    def problems(self, site: LinearSite, params: Params) -> list[str]:
        n, places, size = site.in_features, params["frod_s_indices"], params["frod_s_size"]
        inside = places.numel() == 0 or (int(places.min()) >= 0 and int(places.max()) < n)
        fits = size.tolist() == [n, n]
        return [] if inside and fits else [f"frod_s_indices of {site.name} lie outside a matrix of {n} x {n}"]


def kind_of(path: str) -> str:
    """Return the kind of a layer: the last two names of its path, as PEFT joins them. Layers of a kind share V."""
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def block_of(path: str, order: int) -> int:
    """Return the index of a layer's block: the number after ``layers``, or else the first number in its path. Return
    ``order`` if there is no number.
    """
    parts = path.split(".")
    after = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(part) for part in (*after, *parts) if part.isdigit()), order)


def joint_basis(weights: list[Float[Tensor, "_ i"]], ridge: float) -> Float[Tensor, "i i"]:
    """Return V of matrices with one width: the common eigenvectors of their parts in a joint QR decomposition.

    If the matrices together have fewer rows than columns, V holds their right singular vectors. ``ridge`` stabilizes
    the decomposition.
    """
    stacked = torch.cat(weights)
    if stacked.shape[0] < stacked.shape[1]:
        right: Tensor = torch.linalg.svd(stacked, full_matrices=True).Vh
        return right.T.contiguous()
    q, r = torch.linalg.qr(stacked)
    one = torch.eye(r.shape[1], dtype=r.dtype)
    parts = q.split([len(weight) for weight in weights])
    common = sum((torch.linalg.inv(part.T @ part + ridge * one) for part in parts), torch.zeros_like(one))
    basis: Tensor = r.T @ torch.linalg.eigh(common / len(parts)).eigenvectors
    return basis.contiguous()


def _in_basis(w: Float[Tensor, "o i"], v: Float[Tensor, "i i"]) -> tuple[Float[Tensor, "o i"], Float[Tensor, " i"]]:
    """Return U and l with ``W = U diag(l) Vᵀ``, where U's columns have norm 1; in float64 on the CPU, as PEFT does."""
    wide, basis = w.detach().double().cpu(), v.detach().double().cpu()
    try:
        turned = torch.linalg.solve(basis, wide.T).T
    except RuntimeError:  # torch's error for a singular matrix
        turned = wide @ torch.linalg.pinv(basis, rtol=1e-6).T
    norms = turned.norm(dim=0)
    u = torch.where(norms > _LEAST_NORM, turned / norms.clamp_min(_LEAST_NORM), 0)
    return u.float(), norms.float()
