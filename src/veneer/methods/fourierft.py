"""FourierFT: ``W + scaling · Re(F⁻¹(S))``, S a spectrum of n trained numbers at random places (Gao et al. 2024,
arXiv:2405.03003, eq. 2 to 4).

The change has full rank. Its products Fourier-transform a vector twice instead of forming ΔW.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.patterns import PatternChecks, below_one, broken, first_match, values_of
from veneer.contract.seeds import no_seeds
from veneer.contract.targets import FamilyTargets
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite
from veneer.records.terms.change import Change


@dataclass(frozen=True, slots=True, kw_only=True)
class FourierChange(Change):
    """Change ``scaling · Re(F⁻¹(S))``; S (o, i) has ``values`` at ``rows`` and ``columns`` and is zero elsewhere."""

    values: Float[Tensor, " n"]
    rows: Int[Tensor, " n"]
    columns: Int[Tensor, " n"]
    size: tuple[int, int]
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.values.dtype, torch.float32)  # there is no transform in 16 bits

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        o, i = self.size
        flat = torch.zeros(o * i, dtype=self.dtype, device=self.values.device)
        spectrum = flat.index_add(0, self.rows * i + self.columns, self.values.to(self.dtype)).view(o, i)
        made: Tensor = torch.fft.ifft2(spectrum).real * self.scaling
        return made.to(dtype or self.values.dtype)

    def matmul(self, x: Tensor) -> Tensor:
        taken = torch.fft.ifft(x)[..., self.columns] * self.values.to(self.dtype)
        spectrum = taken.new_zeros(*x.shape[:-1], self.size[0]).index_add(-1, self.rows, taken)
        made: Tensor = torch.fft.ifft(spectrum).real * self.scaling
        return made

    def matmul_t(self, dy: Tensor) -> Tensor:
        return replace(self, rows=self.columns, columns=self.rows, size=self.size[::-1]).matmul(dy)


@dataclass(frozen=True, kw_only=True)
class FourierFTConfig(LinearMethod):
    """Settings of FourierFT, with the names that PEFT gives them.

    ``n_frequency`` numbers are trained in each layer, at places drawn from ``random_loc_seed``. ``init_weights`` starts
    them at zero. False draws them from a normal distribution, so that the start changes the model.
    """

    peft_type: ClassVar[str] = "FOURIERFT"
    identity_at_start: ClassVar[bool] = False
    headline: ClassVar[tuple[str, ...]] = ("n_frequency", "scaling", "target_modules")
    family_targets: ClassVar[FamilyTargets] = {
        **LOW_RANK,
        **{family: {"target_modules": ("mlp.c_proj",)} for family in ("gpt2", "gpt_bigcode")},
    }
    inert: ClassVar[frozenset[str]] = frozenset(
        {"n_frequency", "n_frequency_pattern", "fan_in_fan_out", "bias", "init_weights"}
    )

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "fourier_only"] = "none"
    n_frequency_pattern: Mapping[str, int] = field(default_factory=dict)
    init_weights: bool = False

    def problems(self) -> list[str]:
        found = super().problems() + broken({"n_frequency_pattern": self.n_frequency_pattern})
        found += no_seeds({"random_loc_seed": self.random_loc_seed})
        return found + below_one(values_of(self, "n_frequency", "n_frequency_pattern"))

    @property
    def checks(self) -> Checks:
        return _Checks({"n_frequency_pattern": self.n_frequency_pattern}, self)

    def frequencies(self, site: LinearSite) -> int:
        """Return how many numbers are trained in a layer."""
        return first_match(self.n_frequency_pattern, site.name, self.n_frequency)

    def shapes(self, site: LinearSite) -> Shapes:
        return {"fourierft_spectrum": (self.frequencies(site),)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        n = self.frequencies(site)
        return {"fourierft_spectrum": torch.zeros(n) if self.init_weights else torch.randn(n, generator=generator)}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        values, size = params["fourierft_spectrum"], (site.out_features, site.in_features)
        rows, columns = places(self.random_loc_seed, *size, len(values), device=values.device)
        return LinearDelta(
            adds=(FourierChange(values=values, rows=rows, columns=columns, size=size, scaling=self.scaling),)
        )


@dataclass(frozen=True)
class _Checks(PatternChecks):
    config: FourierFTConfig

    def layers(self, sites: Sequence[LinearSite]) -> list[str]:
        """Return a problem for each layer with fewer weights than ``n_frequency``."""
        return [
            f"n_frequency={n} at {site.name}, which has {site.out_features} x {site.in_features} weights: give at most "
            f"{site.out_features * site.in_features} (n_frequency_pattern sets it for single modules)"
            for site in sites
            if (n := self.config.frequencies(site)) > site.out_features * site.in_features
        ]


@functools.lru_cache(maxsize=64)
def places(seed: int, o: int, i: int, n: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the rows and the columns of n entries of a spectrum (o, i), drawn on the CPU as PEFT draws them.

    The result is shared: do not write to it.
    """
    with torch.inference_mode(False):
        drawn = torch.randperm(o * i, generator=torch.Generator().manual_seed(seed), device="cpu")[:n]
        return (drawn // i).to(device), (drawn % i).to(device)
