"""Initialisation of a bottleneck's matrices down (r, d) and up (d, r). Biases start at zero."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

Matrices = tuple[Float[Tensor, "r d"], Float[Tensor, "d r"]]


def bert(r: int, d: int, generator: torch.Generator | None = None) -> Matrices:
    """Return down and up, both normal with standard deviation 0.02, like BERT's own layers (Devlin et al. 2019): near
    the identity.
    """
    return 0.02 * torch.randn(r, d, generator=generator), 0.02 * torch.randn(d, r, generator=generator)


def mam(r: int, d: int, generator: torch.Generator | None = None) -> Matrices:
    """Return down uniform in ±1/√d (Kaiming uniform with a = √5), up zero: the identity (He et al. 2022,
    arXiv:2110.04366).
    """
    bound = 1 / math.sqrt(d)
    return torch.empty(r, d).uniform_(-bound, bound, generator=generator), torch.zeros(d, r)


def houlsby(r: int, d: int, generator: torch.Generator | None = None) -> Matrices:
    """Return down and up, both normal with deviation 0.01, truncated at two deviations (Houlsby et al. 2019,
    arXiv:1902.00751, section 3.1).
    """
    matrices = torch.empty(r, d), torch.empty(d, r)
    for matrix in matrices:
        torch.nn.init.trunc_normal_(matrix, std=0.01, a=-0.02, b=0.02, generator=generator)
    return matrices
