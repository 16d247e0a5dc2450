"""WaveFT: ``W + scaling · T(C)``, T an inverse wavelet transform and C a matrix of n trained numbers at random places
(Bilican et al. 2025, arXiv:2505.12532, section 3).

The change has full rank. Its products transform a vector instead of forming ΔW.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.known import Known
from veneer.contract.patterns import PatternChecks, below_one, broken, first_match, values_of
from veneer.contract.seeds import no_seeds
from veneer.contract.targets import FamilyTargets
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite
from veneer.records.terms.change import Change
from veneer.records.wavelets import LOW, filters


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients(Change):
    """Change ``scaling · T(C)``; C has ``values`` at ``rows`` and ``columns`` and is zero elsewhere.

    T is the inverse transform by the wavelet of this name, along both axes. If the name is None, T(C) is C itself. C
    (p, q) is larger than the change (o, i), since filters overlap its ends. Along each axis it holds the low band
    first, then the high one.
    """

    values: Float[Tensor, " n"]
    rows: Int[Tensor, " n"]
    columns: Int[Tensor, " n"]
    size: tuple[int, int]
    scaling: float
    wavelet: str | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.values.dtype, torch.float32)  # filters have few taps, and sums of many rows

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        p, q = (padded(n, self.wavelet) for n in self.size)
        flat = self.values.new_zeros(p * q, dtype=self.dtype)
        made = flat.index_add(0, self.rows * q + self.columns, self.values.to(self.dtype)).view(p, q)
        if self.wavelet is not None:
            made = _back(_back(made, self.size[1], self.wavelet).T, self.size[0], self.wavelet).T
        return (made * self.scaling).to(dtype or self.values.dtype)

    def matmul(self, x: Tensor) -> Tensor:
        parts = x if self.wavelet is None else _forth(x, self.wavelet)
        taken = parts[..., self.columns] * self.values.to(x.dtype)
        p = padded(self.size[0], self.wavelet)
        made = taken.new_zeros(*x.shape[:-1], p).index_add(-1, self.rows, taken)
        made = made if self.wavelet is None else _back(made, self.size[0], self.wavelet)
        return made * self.scaling

    def matmul_t(self, dy: Tensor) -> Tensor:
        return replace(self, rows=self.columns, columns=self.rows, size=self.size[::-1]).matmul(dy)


def padded(n: int, wavelet: str | None) -> int:
    """Return the number of wavelet coefficients of a signal of n numbers. It is even, and may be above n, because
    filters overlap the ends. Without a wavelet it is n.
    """
    if wavelet is None:
        return n
    with_overlap = n + len(LOW[wavelet]) - 2
    return with_overlap + with_overlap % 2


def _back(x: Float[Tensor, "*batch p"], n: int, wavelet: str) -> Float[Tensor, "*batch n"]:
    """Return the first n numbers of the inverse transform. The numbers before its start, which the filters add by their
    overlap, are left out.
    """
    bands = x.reshape(-1, 2, x.shape[-1] // 2)
    bank = _bank(wavelet, x)
    made = functional.conv_transpose1d(bands, bank, stride=2, padding=bank.shape[-1] - 2)
    return made[:, 0, :n].reshape(*x.shape[:-1], n)


def _forth(x: Float[Tensor, "*batch n"], wavelet: str) -> Float[Tensor, "*batch p"]:
    """Apply the transpose of the linear map `_back`."""
    bank, n = _bank(wavelet, x), x.shape[-1]
    p, overlap = padded(n, wavelet), bank.shape[-1] - 2
    wide = functional.pad(x.reshape(-1, 1, n), (overlap, p - n))
    return functional.conv1d(wide, bank, stride=2).reshape(*x.shape[:-1], p)


def _bank(wavelet: str, like: Tensor) -> Float[Tensor, "2 1 k"]:
    return torch.tensor(filters(wavelet), dtype=like.dtype, device=like.device)[:, None]


@dataclass(frozen=True, kw_only=True)
class WaveFTConfig(LinearMethod):
    """Settings of WaveFT, with the names that PEFT gives them.

    ``n_frequency`` numbers are trained in each layer, at places drawn from ``random_loc_seed``. With
    ``proportional_parameters``, ``n_frequency`` is the mean over layers, and each layer has numbers in proportion to
    its weights. ``use_idwt=False`` leaves the transform out. ``init_weights`` starts the numbers at zero. False draws
    them from a normal distribution, so that the start changes the model. ``allotted`` (the numbers of each layer, if
    they are in proportion) is filled in when the adapter is attached.
    """

    peft_type: ClassVar[str] = "WAVEFT"
    headline: ClassVar[tuple[str, ...]] = ("n_frequency", "scaling", "wavelet_family", "target_modules")
    family_targets: ClassVar[FamilyTargets] = {
        **LOW_RANK,
        **{family: {"target_modules": ("mlp.c_proj",)} for family in ("gpt2", "gpt_bigcode")},
    }
    inert: ClassVar[frozenset[str]] = frozenset(
        {"n_frequency", "n_frequency_pattern", "proportional_parameters", "allotted"}
        | {"fan_in_fan_out", "bias", "init_weights"}
    )

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "waveft_only"] = "none"
    n_frequency_pattern: Mapping[str, int] = field(default_factory=dict)
    proportional_parameters: bool = False
    init_weights: bool = True
    allotted: Mapping[str, int] | None = field(default=None, metadata={"on_disk": False})

    def problems(self) -> list[str]:
        found = super().problems() + broken({"n_frequency_pattern": self.n_frequency_pattern})
        found += no_seeds({"random_loc_seed": self.random_loc_seed})
        if self.wavelet_family not in LOW:
            found.append(f"wavelet_family={self.wavelet_family!r} must be one of {', '.join(LOW)}")
        return found + below_one(values_of(self, "n_frequency", "n_frequency_pattern"))

    @property
    def checks(self) -> Checks:
        return _Checks({"n_frequency_pattern": self.n_frequency_pattern}, self)

    def for_sites(self, sites: Sequence[LinearSite], known: Known) -> Self:
        if not self.proportional_parameters:
            return self
        sizes = {site.name: site.out_features * site.in_features for site in sites}
        budget, weights = self.n_frequency * len(sites), sum(sizes.values())
        return replace(self, allotted={name: max(1, round(n / weights * budget)) for name, n in sizes.items()})

    def frequencies(self, site: LinearSite) -> int:
        """Return how many numbers are trained in a layer."""
        own = first_match(self.n_frequency_pattern, site.name, self.n_frequency)
        return (self.allotted or {}).get(site.name, own)

    def shapes(self, site: LinearSite) -> Shapes:
        return {"waveft_spectrum": (self.frequencies(site),)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        n = self.frequencies(site)
        return {"waveft_spectrum": torch.zeros(n) if self.init_weights else 0.01 * torch.randn(n, generator=generator)}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        values, size = params["waveft_spectrum"], (site.out_features, site.in_features)
        wavelet = self.wavelet_family if self.use_idwt else None
        rows, columns = places(self.random_loc_seed, *size, len(values), wavelet, device=values.device)
        change = Coefficients(
            values=values, rows=rows, columns=columns, size=size, scaling=self.scaling, wavelet=wavelet
        )
        return LinearDelta(adds=(change,))


@dataclass(frozen=True)
class _Checks(PatternChecks):
    config: WaveFTConfig

    def layers(self, sites: Sequence[LinearSite]) -> list[str]:
        """Return a problem for each layer with fewer weights than ``n_frequency``."""
        config = self.config.for_sites(sites, Known())
        how = "" if config.proportional_parameters else " (n_frequency_pattern sets it for single modules)"
        return [
            f"n_frequency={n} at {site.name}, which has {site.out_features} x {site.in_features} weights: give at most "
            f"{site.out_features * site.in_features}{how}"
            for site in sites
            if (n := config.frequencies(site)) > site.out_features * site.in_features
        ]


@functools.lru_cache(maxsize=64)
def places(
    seed: int, o: int, i: int, n: int, wavelet: str | None, *, device: torch.device
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Return the rows and the columns in C of n trained numbers, drawn on the CPU as PEFT draws them. Do not write to
    the tensors.

    The numbers are drawn among o·i places in the middle of C. In PEFT, and so in its files, the two bands that are high
    along one axis alone are swapped.
    """
    with torch.inference_mode(False):
        drawn = torch.randperm(o * i, generator=torch.Generator().manual_seed(seed), device="cpu")[:n]
        rows, columns = drawn // i, drawn % i
        if wavelet is not None:
            p, q = padded(o, wavelet), padded(i, wavelet)
            rows, columns = rows + (p - o) // 2, columns + (q - i) // 2
            row, row_band = rows % (p // 2), rows // (p // 2)
            column, column_band = columns % (q // 2), columns // (q // 2)
            rows, columns = row + column_band * (p // 2), column + row_band * (q // 2)
        return rows.to(device), columns.to(device)
