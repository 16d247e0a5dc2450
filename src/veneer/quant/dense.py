"""Frozen weight in its own dtype: float32, bfloat16 or float16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.ops.matmul import matmul, widens
from veneer.ops.product import recorded_product, visible
from veneer.plain.autocast import autocast_dtype


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """Frozen weight ``W (o, i)`` as one tensor. A layer that stores Wᵀ (GPT-2's Conv1D) passes a transposed view.

    Products are computed in ``compute_dtype``, or in the tensor's dtype if it is None; under autocast, in autocast's
    dtype.
    """

    tensor: Float[Tensor, "o i"]
    compute_dtype: torch.dtype | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensor.shape[0], self.tensor.shape[1]

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def matmul(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        return self._product(x, transposed=False)

    def matmul_t(self, dy: Float[Tensor, "*batch o"]) -> Float[Tensor, "*batch i"]:
        return self._product(dy, transposed=True)

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "o i"]:
        return self.tensor if dtype is None else self.tensor.to(dtype)

    def _product(self, x: Tensor, transposed: bool) -> Tensor:
        """Return ``W x``, or ``Wᵀ x`` if ``transposed``. The dtype of the product is autocast's if active, else
        ``compute_dtype``, else the weight's.
        """
        asked = autocast_dtype(x.device)
        dtype = asked or self.compute_dtype or self.tensor.dtype
        if widens(x, dtype) and not self.tensor.requires_grad and not torch.compiler.is_compiling():
            return recorded_product(x.to(dtype), self._multiply, transposed)
        weight = self.tensor.T if transposed else self.tensor
        return torch.nn.functional.linear(*((x, weight) if asked else (x.to(dtype), weight.to(dtype))))

    def _multiply(self, x: Tensor, transposed: bool) -> Tensor:
        return multiply_dense(x, self.tensor if transposed else self.tensor.T)


@visible("multiply_dense(Tensor x, Tensor matrix) -> Tensor")
def multiply_dense(x: Float[Tensor, "*batch k"], matrix: Float[Tensor, "k m"]) -> Float[Tensor, "*batch m"]:
    """Return the product in x's dtype, computed in the CPU's fastest dtype. Autograd records nothing."""
    return matmul(x.reshape(-1, x.shape[-1]), matrix, x.dtype).reshape(*x.shape[:-1], -1)
