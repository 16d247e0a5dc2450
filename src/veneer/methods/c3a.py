"""C3A: ``W + ΔW``, ΔW made of circulant blocks (Chen et al. 2024, arXiv:2407.19342, section 3.3).

A block is given by b numbers, and its products go through Fourier transforms of length b.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.contract import LinearMethod, Params, Shapes
from veneer.contract.checks import Checks
from veneer.contract.family_targets import LOW_RANK
from veneer.contract.patterns import PatternChecks, below_one, broken, first_match, values_of
from veneer.contract.peft_fields import PeftFields
from veneer.contract.targets import FamilyTargets
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite
from veneer.records.terms.change import Change
from veneer.records.terms.form import Form


@dataclass(frozen=True, slots=True, kw_only=True)
class Circulant(Change):
    """Change made of m by n circulant blocks (b, b). Entry (p, j) of a block is ``scale`` times its kernel at ``(j - p)
    mod b``.
    """

    kernel: Float[Tensor, "m n b"]
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        m, n, b = self.kernel.shape
        return m * b, n * b

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.kernel.dtype, torch.float32)  # there is no transform in 16 bits

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.kernel.dtype
        scaled = self.kernel.to(torch.promote_types(self.kernel.dtype, dtype)) * self.scale
        made: Tensor = _Blocks.apply(scaled.to(dtype))  # type: ignore[no-untyped-call]
        return made.reshape(self.shape)

    def matmul(self, x: Tensor) -> Tensor:
        return self._product(x, self._spectrum().conj())

    def matmul_t(self, dy: Tensor) -> Tensor:
        return self._product(dy, self._spectrum().transpose(0, 1))

    def form(self) -> Form:
        m, n, b = self.kernel.shape
        return Form("circulant", (m, n, b), self.kernel * self.scale)

    def _spectrum(self) -> Tensor:
        spectrum: Tensor = torch.fft.rfft(self.kernel.to(self.dtype))
        return spectrum

    def _product(self, x: Tensor, spectrum: Tensor) -> Tensor:
        b = self.kernel.shape[2]
        parts = torch.fft.rfft(x.reshape(*x.shape[:-1], -1, b))
        made: Tensor = torch.fft.irfft(torch.einsum("...nf,mnf->...mf", parts, spectrum), n=b)
        return made.flatten(-2) * self.scale


class _Blocks(torch.autograd.Function):
    """Autograd function from kernels (m, n, b) to the rows of their circulant blocks, (m, b, n, b)."""

    @staticmethod
    def forward(ctx: Any, kernel: Tensor) -> Tensor:
        b, twice = kernel.shape[2], torch.cat([kernel, kernel], dim=2)
        return torch.stack([twice[..., b - p : 2 * b - p] for p in range(b)], dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Sum the gradient along the diagonals of each circulant block.

        Each row of a block is repeated once, so that a wrapped diagonal is a strided view: its entries are 2 b + 1
        numbers apart.
        """
        blocks = grads[0].transpose(1, 2)
        b = blocks.shape[3]
        return torch.cat([blocks, blocks], dim=3).flatten(2).unfold(2, b, 2 * b + 1).sum(dim=2)


@dataclass(frozen=True, kw_only=True)
class C3AConfig(LinearMethod):
    """Settings of C3A, with the names that PEFT gives them.

    ``block_size`` must divide the inputs and the outputs of each layer. ``init_weights``: True starts at zero, without
    a change of the model. "xavier_uniform" (or False), "kaiming_uniform" and "gaussian" start with a change.
    """

    peft_type: ClassVar[str] = "C3A"
    identity_at_start: ClassVar[bool] = False
    headline: ClassVar[tuple[str, ...]] = ("block_size", "target_modules")
    family_targets: ClassVar[FamilyTargets] = {
        **LOW_RANK,
        **{family: {"target_modules": ("mlp.c_proj",)} for family in ("gpt2", "gpt_bigcode")},
    }
    peft_fields: ClassVar[PeftFields] = PeftFields(quiet=("exclude_modules",))
    inert: ClassVar[frozenset[str]] = frozenset({"block_size", "block_size_pattern", "bias", "init_weights"})

    block_size: int = 256
    bias: Literal["none", "all", "c3a_only"] = "none"
    block_size_pattern: Mapping[str, int] = field(default_factory=dict)
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] = "xavier_uniform"

    def problems(self) -> list[str]:
        found = super().problems() + broken({"block_size_pattern": self.block_size_pattern})
        return found + below_one(values_of(self, "block_size", "block_size_pattern"))

    @property
    def checks(self) -> Checks:
        return _Checks({"block_size_pattern": self.block_size_pattern}, self)

    def size(self, site: LinearSite) -> int:
        """Return the size of the blocks in a layer."""
        return first_match(self.block_size_pattern, site.name, self.block_size)

    def shapes(self, site: LinearSite) -> Shapes:
        b = self.size(site)
        return {"c3a_kernel": (site.out_features // b, site.in_features // b, b)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        shape = self.shapes(site)["c3a_kernel"]
        if self.init_weights is True:
            return {"c3a_kernel": torch.zeros(shape)}
        if self.init_weights == "gaussian":
            return {"c3a_kernel": torch.randn(shape, generator=generator)}
        i, o = site.in_features, site.out_features
        bound = math.sqrt(1 / i if self.init_weights == "kaiming_uniform" else 6 / (i + o))
        return {"c3a_kernel": torch.empty(shape).uniform_(-bound, bound, generator=generator)}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        return LinearDelta(adds=(Circulant(kernel=params["c3a_kernel"], scale=1 / site.in_features),))

    def site_of(self, site: LinearSite, shapes: Mapping[str, tuple[int, ...]]) -> LinearSite:
        m, n, b = shapes["c3a_kernel"]
        return replace(site, in_features=n * b, out_features=m * b)


@dataclass(frozen=True)
class _Checks(PatternChecks):
    config: C3AConfig

    def layers(self, sites: Sequence[LinearSite]) -> list[str]:
        return [
            f"block_size={b} at {site.name} does not divide its {site.in_features} inputs and {site.out_features} "
            f"outputs: give a divisor of {math.gcd(site.in_features, site.out_features)} (block_size_pattern sets it "
            "for single modules)"
            for site in sites
            if math.gcd(site.in_features, site.out_features) % (b := self.config.size(site))
        ]
