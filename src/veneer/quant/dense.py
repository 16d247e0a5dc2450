"""A frozen weight kept as it is: float32, bfloat16 or float16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """``W (o, i)`` as one tensor. A layer that stores Wᵀ (GPT-2's Conv1D) passes a transposed view."""

    tensor: Float[Tensor, "o i"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensor.shape[0], self.tensor.shape[1]

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def matmul(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        return torch.nn.functional.linear(_compute(x, self.tensor), self.tensor)

    def matmul_t(self, dy: Float[Tensor, "*batch o"]) -> Float[Tensor, "*batch i"]:
        return _compute(dy, self.tensor) @ self.tensor

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "o i"]:
        return self.tensor if dtype is None else self.tensor.to(dtype)


def _compute(x: Tensor, weight: Tensor) -> Tensor:
    """x in the weight's dtype, but for autocast, which chooses for itself."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)
