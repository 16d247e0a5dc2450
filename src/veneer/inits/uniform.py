"""Kaiming's uniform initialisation of a matrix, as PEFT draws most factors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def kaiming_uniform(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Return a matrix (rows, columns) uniform in ±1/√columns (He et al. 2015, with a = √5), in float32 on the CPU.

    All axes behind the first count as columns, as those of a convolution's kernel do.
    """
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(*shape).uniform_(-bound, bound, generator=generator)
