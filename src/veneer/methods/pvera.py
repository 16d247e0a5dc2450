"""PVeRA: VeRA whose inner activations are drawn in training, ``W x + b ⊙ B (μ + ε exp(ρ / 2))`` (arXiv:2512.07703).

μ and ρ, of r numbers each, are the halves of ``d ⊙ A x``, and ε is standard normal noise. Outside training the inner
activations are their mean μ: a low-rank pair, as in VeRA.

Difference from PEFT: PEFT draws the noise itself. Here a layer draws a key in each pass from torch's generator. The
noise follows from the key and from a token's place among those of its adapter. The backward pass can repeat it, and
other adapters of a batch do not change it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import linear

from veneer.contract import Params, Shapes
from veneer.contract.peft_fields import PeftFields
from veneer.contract.projected import ProjectedMethod
from veneer.contract.shared import Shared
from veneer.inits.projections import projections
from veneer.ops.dropout import Mask, dropout
from veneer.ops.traced import is_tracing
from veneer.records.deltas import LinearDelta
from veneer.records.sites import LinearSite
from veneer.records.terms.mixture import Mixture

_B, _D, _KEY = "pvera_lambda_b", "pvera_lambda_d", "key"
_BLOCK = 64  # rows whose noise is drawn together, even if fewer are there: numbers depend on how many are drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledMixture(Mixture):
    """Change whose inner activations are random: ``b_scale ⊙ B (μ + ε exp(ρ / 2))`` with ``(μ, ρ) = core ⊙ A x``.

    ``key`` (), of int64, determines the noise ε, and the mask of a dropout with probability ``p`` on x. ``first`` is
    the index of x's first row among the adapter's rows in the pass.
    """

    a: Float[Tensor, "2r i"]
    core: Float[Tensor, " 2r"]
    b: Float[Tensor, "o r"]
    b_scale: Float[Tensor, " o"]
    key: Int64[Tensor, ""]
    p: float = 0.0
    first: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def matmul(self, x: Tensor) -> Tensor:
        inner = linear(self._dropped(x), self.a.to(x.dtype)).to(self.core.dtype) * self.core
        mean, log_variance = inner.chunk(2, dim=-1)
        drawn = mean + self._noise(mean) * (0.5 * log_variance).exp()
        return linear(drawn.to(x.dtype), self.b.to(x.dtype)) * self.b_scale.to(x.dtype)

    def rounded(self, dtype: torch.dtype) -> SampledMixture:
        return replace(self, a=self.a.to(dtype), b=self.b.to(dtype))  # the variance is an exponential: not rounded

    def on(self, rows: slice, n_before: int) -> SampledMixture:
        return replace(self, first=self.first + n_before)

    def _dropped(self, x: Tensor) -> Tensor:
        if not self.p:
            return x
        n = x.shape[:-1].numel()
        ids = torch.arange(self.first, self.first + n, device=x.device)
        return dropout(x, Mask(self.p, int(self.key), ids))

    def _noise(self, like: Tensor) -> Tensor:
        if is_tracing() or torch.compiler.is_compiling():  # a graph is not computed again from a key
            return torch.randn_like(like)
        n, r = like.shape[:-1].numel(), like.shape[-1]
        begin, skipped = divmod(self.first, _BLOCK)
        blocks = [
            torch.randn(_BLOCK, r, dtype=like.dtype, generator=torch.Generator().manual_seed(int(self.key) + place))
            for place in range(begin, (self.first + n) // _BLOCK + 1)
        ]
        return torch.cat(blocks)[skipped : skipped + n].to(like.device).view(like.shape)


@dataclass(frozen=True, kw_only=True)
class PveraConfig(ProjectedMethod):
    """Settings of PVeRA, with the names that PEFT gives them.

    ``save_projection`` writes A and B too. If a file holds them, they are checked against ``projection_prng_key``.
    ``projection_size`` (largest output, largest input of the adapted layers) is filled in when the adapter is attached.
    ``sample_at_inference`` is not supported. Training with ``generator_seed`` is not supported either, because noise is
    drawn by torch's generator, whose state checkpoints keep.
    """

    peft_type: ClassVar[str] = "PVERA"
    rate: ClassVar[str] = "pvera_dropout"
    peft_fields: ClassVar[PeftFields] = PeftFields(quiet=("exclude_modules",))
    inert: ClassVar[frozenset[str]] = frozenset({"pvera_dropout", "generator_seed"})

    pvera_dropout: float = 0.0
    bias: Literal["none", "all", "pvera_only"] = "none"
    sample_at_inference: bool = False
    generator_seed: int | None = None

    def problems(self) -> list[str]:
        found = super().problems()
        if self.sample_at_inference:
            found.append(
                "sample_at_inference=True is not supported: set it to False, for the mean of the activations outside "
                "of training"
            )
        if self.generator_seed is not None and not self.inference_mode:
            found.append(
                f"generator_seed={self.generator_seed!r} asks for a generator at each layer, which no checkpoint "
                "keeps: leave it out, and seed torch"
            )
        return found

    @property
    def draws_by_token(self) -> bool:
        return True

    def shapes(self, site: LinearSite) -> Shapes:
        return {_B: (site.out_features,), _D: (2 * self.r,)}

    def init(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        n = 2 * self.r
        if not self.init_weights:  # as in PEFT's tests: not the base model at the start
            return {_B: torch.ones(site.out_features), _D: torch.randn(n, generator=generator)}
        return {_B: torch.zeros(site.out_features), _D: torch.full((n,), self.d_initial)}

    def drawn(self, site: LinearSite, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return a random key of 62 bits, from which a training pass draws the noise of a layer."""
        return {_KEY: torch.randint(2**62, (), generator=generator)}

    def lower(self, site: LinearSite, params: Params) -> LinearDelta:
        b_scale, core = params[_B], params[_D]
        size = self.projection_size or (site.out_features, site.in_features)
        big_a, big_b = self._projections(size, core.device, core.dtype)
        a, b = big_a[:, : site.in_features], big_b[: site.out_features]
        if _KEY not in params:
            return LinearDelta.pair(a[: self.r], b, core=core[: self.r], b_scale=b_scale)
        change = SampledMixture(a=a, core=core, b=b, b_scale=b_scale, key=params[_KEY], p=self.pvera_dropout)
        return LinearDelta(adds=(change,))

    @property
    def shared(self) -> Shared | None:
        source = f"projection_prng_key={self.projection_prng_key!r}"
        return Shared(names=("pvera_A", "pvera_B"), draw=self._saved, source=source, is_saved=self.save_projection)

    def _saved(self) -> dict[str, Tensor]:
        if self.projection_size is None:
            return {}
        a, b = self._projections(self.projection_size, torch.device("cpu"), torch.float32)
        return {"pvera_A": a, "pvera_B": b}

    def _projections(
        self, size: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "2r i"], Float[Tensor, "o r"]]:
        rows, columns = size
        return projections(self.projection_prng_key, (2 * self.r, columns), (rows, self.r), device=device, dtype=dtype)
