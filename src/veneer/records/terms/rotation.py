"""Rotation of inputs or outputs: an orthogonal map, or any other linear map of a layer's features.

Liu et al. 2023 (arXiv:2306.07280) rotate a layer's inputs in blocks. Other subclasses map pairs of features, permute
them, or also scale them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.records.terms.form import Form
from veneer.records.terms.term import Term


@dataclass(frozen=True, slots=True)
class Rotation(Term, ABC):
    """Linear map ``x ↦ M x`` with M (n, n), of the inputs or the outputs of a layer."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Number of features, n."""

    @abstractmethod
    def apply(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Return ``M x`` on the last axis, differentiable in x and the tensors, in the wider dtype of the two."""

    def blocks_of_map(self) -> Float[Tensor, "k b b"] | None:
        """Return the diagonal blocks of M if M is block-diagonal with small blocks, otherwise None.

        They are differentiable in the tensors.
        """
        return None

    def form(self) -> Form | None:
        blocks = self.blocks_of_map()
        return None if blocks is None else Form("blocks", (len(blocks), blocks.shape[-1]), blocks)

    @abstractmethod
    def transposed(self) -> Rotation:
        """Return the map ``Mᵀ``: the inverse of an orthogonal map."""

    def fold_input(self, weight: Float[Tensor, "*experts o n"]) -> Float[Tensor, "*experts o n"]:
        """Return ``W M``."""
        return self.transposed().apply(weight)

    def fold_output(self, weight: Float[Tensor, "*experts n i"]) -> Float[Tensor, "*experts n i"]:
        """Return ``M W``."""
        return self.apply(weight.mT).mT


@dataclass(frozen=True, slots=True)
class BlockRotation(Rotation):
    """Rotation whose M is block-diagonal: ``blocks[k]`` acts on features k·b to (k + 1)·b."""

    blocks: Float[Tensor, "k b b"]

    @property
    def width(self) -> int:
        return self.blocks.shape[0] * self.blocks.shape[1]

    def apply(self, x: Tensor) -> Tensor:
        k, b, _ = self.blocks.shape
        dtype = torch.promote_types(x.dtype, self.blocks.dtype)
        parts = x.to(dtype).reshape(*x.shape[:-1], k, b)
        return torch.einsum("...kb,kcb->...kc", parts, self.blocks.to(dtype)).flatten(-2)

    def blocks_of_map(self) -> Tensor:
        return self.blocks

    def transposed(self) -> BlockRotation:
        return BlockRotation(self.blocks.mT)
