"""Low-rank change with A's gradient computed from compressed inputs (VeLoRA, Miles et al. 2024, arXiv:2405.17991)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad

from veneer.records.terms.change import Change


@dataclass(frozen=True, slots=True, kw_only=True)
class Compressed(Change):
    """Change ``times B A``. The gradient of A is computed from inputs compressed in ``groups`` of features, and
    multiplied by ``scale``.

    A group is compressed to its product with the vector ``embed``. If ``is_mean``, each pass computes this vector from
    its inputs (`mean_of`).
    """

    a: Float[Tensor, "r i"]
    b: Float[Tensor, "o r"]
    embed: Float[Tensor, " g"]
    times: float
    groups: int
    scale: float
    is_mean: bool

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        return self.times * self.b.to(dtype) @ self.a.to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        embed = self.mean_of(x) if self.is_mean else self.embed
        given = (x, self.a.to(x.dtype), embed.to(x.dtype), self.groups, self.scale)
        inner: Tensor = _ACompressed.apply(*given)  # type: ignore[no-untyped-call]
        return linear(inner, self.b.to(x.dtype)) * self.times

    def is_made_for(self, n_rows: int, dtype: torch.dtype) -> bool:
        return False  # a matrix has the gradient of whole inputs

    @torch.no_grad()
    def mean_of(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, " g"]:
        """Return the projection vector of a pass: the mean of all groups of all tokens, normalized to length 1."""
        return unit(grouped(x, self.groups).mean(dim=(0, 1)))


class _ACompressed(torch.autograd.Function):
    """Function A x whose gradient in A is computed from compressed inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, embed: Tensor, groups: int, scale: float) -> Tensor:
        ctx.save_for_backward(grouped(x, groups) @ embed, a, embed)
        ctx.scale = scale
        return linear(x, a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        compressed, a, embed = ctx.saved_tensors
        dx = dy @ a if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None, None
        inner = dy.reshape(-1, len(a)).T @ compressed  # (r, groups): the inputs are never whole again
        da = (inner[..., None] * embed).flatten(1)[:, : a.shape[1]] * ctx.scale
        return dx, da, None, None, None


def grouped(x: Float[Tensor, "*batch i"], groups: int) -> Float[Tensor, "n groups g"]:
    """Return the features of each token in groups; the last group is padded with zeros."""
    width = -(-x.shape[-1] // groups)
    return pad(x, (0, groups * width - x.shape[-1])).reshape(-1, groups, width)


def unit(vector: Float[Tensor, " g"]) -> Float[Tensor, " g"]:
    """Return the vector normalized to length 1; for a zero vector, the normalized vector of ones."""
    vector = vector.float()
    vector = torch.where((vector == 0).all(), torch.ones_like(vector), vector)
    length: Tensor = torch.linalg.vector_norm(vector)
    return vector / length
