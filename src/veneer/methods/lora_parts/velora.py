"""VeLoRA: the gradient of A from inputs in compressed form, a number for each group of features (Miles et al. 2024,
arXiv:2405.17991, section 3).

A group x_g of g inputs becomes ``x_g · e`` with a unit vector e that all groups share, and ``s (x_g · e) e`` again for
the gradient. Forward passes, and gradients in everything else, are LoRA's.

Departs: e is the mean of the pass itself with ``init_type="batch_average"``. That in a file is kept for PEFT, which
writes the one of its last pass. Layers keep one x for all that read it, also where it is compressed for A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad

from veneer.core.field_types import check, settings_of
from veneer.core.sites import LinearSite
from veneer.core.terms.change import Change
from veneer.core.terms.pair import Pair

EMBED = "lora_velora_embed"
IN_TRAINING = "velora_in_training"


@dataclass(frozen=True)
class VeloraConfig:
    """Settings of VeLoRA, in PEFT's fields.

    ``num_groups`` groups of features are compressed, and ``scale`` is s. ``init_type`` names e: the mean of each pass
    ("batch_average") or a random vector ("random"). "batch_average_once" is read from files. Training with it is
    refused, since e would be that of a first batch.
    """

    num_groups: int = 64
    scale: float = 1.0
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"

    def __post_init__(self) -> None:
        check(self, self._problems)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> VeloraConfig:
        """Return the settings from a file's fields. Raises ConfigError for unknown ones."""
        return settings_of(cls, values)

    def _problems(self) -> list[str]:
        found = [] if self.num_groups > 0 else [f"num_groups={self.num_groups!r} must be a whole number of at least 1"]
        return found + ([] if self.scale > 0 else [f"scale={self.scale!r} must be above 0"])

    def width(self, site: LinearSite) -> int:
        """Return the number of features in a group. Zeros fill the last one up."""
        return -(-site.in_features // self.num_groups)

    def init(self, site: LinearSite, generator: torch.Generator | None) -> Float[Tensor, " g"]:
        """Return the initial e: random, or zeros where it is a mean."""
        width = self.width(site)
        return unit(torch.randn(width, generator=generator)) if self.init_type == "random" else torch.zeros(width)

    def compressed(self, pair: Pair, embed: Float[Tensor, " g"]) -> Compressed:
        """Return the change of a training pass that has the product of a pair."""
        is_mean = self.init_type != "random"
        return Compressed(
            a=pair.a, b=pair.b, embed=embed, times=pair.scale, groups=self.num_groups, scale=self.scale, is_mean=is_mean
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Compressed(Change):
    """Change ``times B A``, whose A has the gradient of inputs that were compressed in ``groups``."""

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
        """Return e of a pass: the direction of the mean of all groups of all tokens."""
        return unit(grouped(x, self.groups).mean(dim=(0, 1)))


class _ACompressed(torch.autograd.Function):
    """A x, with the gradient in A of compressed inputs."""

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
    """Return the features of each token in groups, the last one filled up with zeros."""
    width = -(-x.shape[-1] // groups)
    return pad(x, (0, groups * width - x.shape[-1])).reshape(-1, groups, width)


def unit(vector: Float[Tensor, " g"]) -> Float[Tensor, " g"]:
    """Return the direction of a vector; that of ones for a vector of zeros."""
    vector = vector.float()
    vector = torch.where((vector == 0).all(), torch.ones_like(vector), vector)
    length: Tensor = torch.linalg.vector_norm(vector)
    return vector / length
