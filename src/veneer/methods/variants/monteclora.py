"""MonteCLoRA: in training A has noise, the mean of n samples by weights that are drawn too (Sengupta et al. 2024,
arXiv:2411.04358, section 4).

A becomes ``A + s (Σₖ wₖ Zₖ diag(σ))ᵀ``, Zₖ (i, r) of standard normal numbers. ``σ² = exp(2 v) u`` with the diagonal u
of a Wishart matrix, and w is a softmax of normal numbers around log α, ``α = exp(p)``. v and p are trained with A and
B. Outside of training there is no noise: the update is LoRA's.

Difference from PEFT: each pass draws its numbers from torch's generator. PEFT holds ``buffer_size`` draws at each
layer. The terms of the loss have draws of their own, of the same distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.contract.parameters import Params, Shapes
from veneer.contract.patterns import below_one
from veneer.contract.settings import Settings
from veneer.methods.variants import Variant
from veneer.records.sites import LinearSite

STD, WEIGHTS = "monteclora_std", "monteclora_weights"
_HELD = ("monteclora_variance", "monteclora_drawn_weights")  # of a last pass: kept for PEFT, and never read
_DISK_NAMES = {
    STD: "lora_monteclora_sampler.std_prior",
    WEIGHTS: "lora_monteclora_sampler.expert_weights_prior",
    _HELD[0]: "lora_monteclora_sampler.gaussian_var_prior",
    _HELD[1]: "lora_monteclora_sampler.expert_weights",
}
_Z, _U, _Y = "monteclora_z", "monteclora_u", "monteclora_y"
_LEAST_VARIANCE, _LEAST = 1e-3, 1e-6  # PEFT's


@dataclass(frozen=True)
class MontecloraConfig(Settings, Variant):
    """Settings of MonteCLoRA, with the names that PEFT gives them.

    ``num_samples`` is n, ``sample_scaler`` the scale s of the noise. ``kl_loss_weight`` weighs the divergences from the
    priors, of which ``dirichlet_prior`` is one. ``use_entropy`` adds the squares of w. ``buffer_size`` is kept for PEFT
    and changes nothing.
    """

    switch = "monteclora_config"
    excludes = (*Variant.whole, "use_qalora", "use_bdlora", "kasa_config")
    disk_names, fixed = _DISK_NAMES, _HELD
    linear_only = inert = has_penalty = True

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def problems(self) -> list[str]:
        found = below_one({"num_samples": self.num_samples, "buffer_size": self.buffer_size})
        if self.dirichlet_prior <= 0:
            found.append(f"dirichlet_prior={self.dirichlet_prior!r} must be above 0")
        return found

    def shapes(self, config: Any, site: LinearSite, shapes: Shapes) -> Shapes:
        r, n = config.rank(site), self.num_samples
        return {STD: (r,), WEIGHTS: (n,), _HELD[0]: (r, r), _HELD[1]: (n,)}

    def init(self, config: Any, site: LinearSite, params: Params, generator: torch.Generator | None) -> Params:
        """Return initial values. v and p are uniform in [0, 1).

        ``monteclora_variance`` and ``monteclora_drawn_weights`` are there only for PEFT's files, and are never read.
        """
        r, n = config.rank(site), self.num_samples
        start = {STD: torch.rand(r, generator=generator), WEIGHTS: torch.rand(n, generator=generator)}
        return {**start, _HELD[0]: torch.eye(r), _HELD[1]: torch.full((n,), 1 / n)}

    def drawn(self, config: Any, site: LinearSite, generator: torch.Generator | None) -> dict[str, Tensor]:
        r = config.rank(site)
        z = torch.randn(self.num_samples, site.in_features, r, generator=generator)
        return {_Z: z, **self._drawn_around(r, generator)}

    def of_pass(self, params: Params) -> Params:
        """Return the parameters of a pass. If ``params`` hold random numbers (in training), A has noise."""
        if _Z not in params:
            return params
        z = torch.einsum("k,kij->ij", self._weights(params), params[_Z].to(params[WEIGHTS].dtype))
        noise = self.sample_scaler * z * self._variances(params).sqrt()
        return {**params, "lora_A": params["lora_A"] + noise.T}

    def penalty(self, layers: Sequence[Params]) -> Tensor | None:
        return torch.stack([self._penalty(params) for params in layers]).mean() if layers else None

    def _penalty(self, params: Params) -> Tensor:
        """Return the penalty of one layer: the divergences and, with ``use_entropy``, the squares of w."""
        params = {**params, **self._drawn_around(len(params[STD]), None)}
        found: Tensor = self.kl_loss_weight * self._divergence(params)
        return found + self._weights(params).square().sum() if self.use_entropy else found

    def _drawn_around(self, r: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Draw the diagonal of a Wishart matrix with r degrees of freedom, and the normal numbers from which the
        weights w are computed.
        """
        return {
            _U: torch.randn(r, r, generator=generator).square().sum(1),
            _Y: torch.randn(self.num_samples, generator=generator),
        }

    def _variances(self, params: Params) -> Float[Tensor, " r"]:
        v = params[STD]
        return ((2 * v).exp() * params[_U].to(v.device, v.dtype)).clamp_min(_LEAST_VARIANCE)

    def _weights(self, params: Params) -> Float[Tensor, " n"]:
        """Return a softmax of normal numbers, which approximates a Dirichlet distribution in the logarithm."""
        p, n = params[WEIGHTS], self.num_samples
        alpha = p.exp().clamp_min(_LEAST)
        variance = (1 - 2 / n) / alpha + (1 / alpha).sum() / n**2
        deviation = (variance.clamp_min(_LEAST) + _LEAST).sqrt()
        mean = alpha.log() - alpha.log().mean()
        return (mean + deviation * params[_Y].to(p.device, p.dtype)).softmax(-1)

    def _divergence(self, params: Params) -> Tensor:
        """Return the divergences of weights, variances and noise from their priors, as in PEFT."""
        alpha, v, variance = params[WEIGHTS].exp(), params[STD], self._variances(params)
        prior, r = torch.full_like(alpha, self.dirichlet_prior), len(v)
        of_weights = torch.lgamma(alpha.sum()) - torch.lgamma(prior.sum())
        of_weights = of_weights + (torch.lgamma(alpha) - torch.lgamma(prior)).sum()
        of_weights = of_weights + ((alpha - prior) * (torch.digamma(alpha) - torch.digamma(alpha.sum()))).sum()
        of_variances = 0.5 * (r * ((2 * v).exp() - 2 * v).sum() - r**2)
        of_noise = 0.5 * self.num_samples * ((variance - variance.log()).sum() - r)
        return of_weights + of_variances + of_noise
