"""Random subspace of all weights of a model: d numbers change every weight, by Fastfood's random matrix."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from veneer.errors import ConfigError


def hadamard(x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    """Return the orthonormal Walsh-Hadamard transform along the last axis, in n log n steps.

    The axis has a power of two as its size.
    """
    n, y, half = x.shape[-1], x, 1
    while half < n:
        pairs = y.reshape(*x.shape[:-1], n // (2 * half), 2, half)
        y = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], dim=-2)
        half *= 2
    return y.reshape(x.shape) / math.sqrt(n)


class Fastfood(nn.Module):
    """Random matrix (n_out, d) with entries of variance 1/d, never formed: stacked blocks ``H G Π H B``.

    H is Hadamard, G Gaussian, Π a permutation and B signs. It takes 13 bytes for each output. Source: Le et al. 2013,
    eq. 5.
    """

    gauss: Tensor
    order: Tensor
    sign: Tensor

    def __init__(self, d: int, n_out: int, generator: torch.Generator) -> None:
        super().__init__()
        width = 1 << (d - 1).bit_length()
        blocks = -(-n_out // width)
        self.d, self.n_out = d, n_out
        gauss = torch.randn(blocks, width, generator=generator)
        order = torch.rand(blocks, width, generator=generator).argsort(dim=1)
        sign = torch.randint(0, 2, (blocks, width), generator=generator, dtype=torch.int8) * 2 - 1
        for name, tensor in (("gauss", gauss * math.sqrt(width / d)), ("order", order), ("sign", sign)):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, theta: Float[Tensor, " d"]) -> Float[Tensor, " n_out"]:
        """Return the product of the matrix with theta."""
        padded = nn.functional.pad(theta, (0, self.sign.shape[1] - self.d))
        mixed = hadamard(padded * self.sign).gather(1, self.order)
        return hadamard(mixed * self.gauss).flatten()[: self.n_out]


class Subspace(nn.Module):
    """Weights of a model as a function of d trained numbers θ: ``θ₀ + P θ``, initially θ₀.

    With ``structure_aware`` (SAID, eq. 4), one of the d numbers for each layer multiplies P's values in that layer. P
    has entries of variance 1/(dimensions of θ), so that one learning rate moves the weights equally far for every d.
    Source: Aghajanyan et al. 2021, arXiv:2012.13255, eq. 1 and 3. Raises ConfigError if d leaves nothing for θ or is
    larger than the model.
    """

    def __init__(self, weights: Mapping[str, Tensor], d: int, *, structure_aware: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.layers = sorted({layer_of(name) for name in weights}) if structure_aware else []
        n_free, n_all = d - len(self.layers), sum(w.numel() for w in weights.values())
        if not 1 <= n_free <= n_all:
            raise ConfigError(f"d={d} must lie between {len(self.layers) + 1} and {n_all}, the number of weights")
        self.start = {name: w.detach().clone() for name, w in weights.items()}
        self.theta = nn.Parameter(torch.zeros(n_free))
        self.factors = nn.Parameter(torch.ones(len(self.layers)), requires_grad=bool(self.layers))
        self.projections = nn.ModuleList(
            Fastfood(n_free, w.numel(), torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed))
            for name, w in weights.items()
        )

    def weights(self) -> dict[str, Tensor]:
        """Return the model's weights by name, in their dtypes."""
        found = {}
        for (name, start), projection in zip(self.start.items(), self.projections, strict=True):
            moved = cast(Tensor, projection(self.theta))
            if self.layers:
                moved = moved * self.factors[self.layers.index(layer_of(name))]
            found[name] = (start + moved.view(start.shape)).to(start.dtype)
        return found


def layer_of(name: str) -> str:
    """Return the layer of a parameter: its path up to the first number, or its module's path if it has none."""
    numbered = re.match(r"(.*?\.\d+)\.", name)
    return numbered.group(1) if numbered else name.rpartition(".")[0]
