"""Specification of a storage format: which tensors hold a matrix, how they are made, and their names on disk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.errors import FormatError, NonFiniteError
from veneer.records.frozen import FrozenWeight

Parts = Mapping[str, Tensor]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@runtime_checkable
class StorageSpec(Protocol):
    """Specification of one matrix in one storage format, without its tensors.

    ``bind(quantize(w))`` has w's shape. ``from_disk(to_disk(parts))`` returns the same spec and bit-equal parts. The
    tensors of ``quantize`` have the shapes and dtypes of ``part_layout``.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (o, i)."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of ``dense()``."""
        ...

    def part_layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return dtype and shape of each stored tensor by name, ``"weight"`` first."""
        ...

    def quantize(self, weight: Float[Tensor, "o i"]) -> dict[str, Tensor]:
        """Return the stored tensors for a weight."""
        ...

    def bind(self, parts: Parts) -> FrozenWeight:
        """Return the frozen weight that these stored tensors make up."""
        ...

    def owns(self, key: str) -> bool:
        """Return True if ``key``, the part of a tensor's name after the module's path, may belong to the weight on
        disk.
        """
        ...

    def to_disk(self, parts: Parts) -> dict[str, Tensor]:
        """Return the tensors by the suffixes with which the format's library stores them. No two share memory."""
        ...

    def from_disk(self, tensors: Parts) -> tuple[StorageSpec, dict[str, Tensor]]:
        """Return spec and stored tensors: the inverse of `to_disk`. Raises FormatError, which lists everything that
        does not fit.
        """
        ...


def part_problems(
    parts: Mapping[str, Tensor | None], layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> list[str]:
    """Return a message for each tensor of a weight that is missing, of another dtype or shape than ``layout`` says, or
    not finite.
    """
    problems = []
    for name, (dtype, shape) in layout.items():
        part = parts.get(name)
        if part is None:
            problems.append(f"{name} is missing, it should be {dtype} {shape}")
        elif part.dtype != dtype or tuple(part.shape) != shape:
            problems.append(f"{name} is {part.dtype} {tuple(part.shape)}, it should be {dtype} {shape}")
        elif part.is_floating_point() and not bool(part.isfinite().all()):
            problems.append(f"{name} holds NaN or infinity")
    return problems


def scale_problems(
    name: str,
    scale: Tensor,
    allowed: Collection[torch.dtype] = FLOATS,
    value: Callable[[Tensor], Tensor] = Tensor.float,
) -> list[str]:
    """Return messages about scales: another dtype, NaN, infinity, zero, or negative. ``value`` converts the scales to
    float32.
    """
    if scale.dtype not in allowed:
        return [f"{name} is {scale.dtype}, allowed: {', '.join(str(dtype) for dtype in allowed)}"]
    values = value(scale)
    if not bool(values.isfinite().all()):
        return [f"{name} holds NaN or infinity"]
    n_wrong = int((values <= 0).sum())
    return [f"{name} holds {n_wrong} scales that are zero or negative"] if n_wrong else []


def not_finite(shape: tuple[int, int]) -> NonFiniteError:
    """Return the error for a weight that cannot be quantized because it holds NaN or infinity."""
    return NonFiniteError(
        f"cannot quantize a weight of shape {shape}: it holds NaN or infinity. Save or fetch the weights again"
    )


def unreadable(
    name: str, shape: tuple[int, int], problems: Collection[str], correct: str = "quantization_config in config.json"
) -> FormatError:
    """Return the error for a weight that cannot be read. Its advice is to fetch the file again, or to correct the thing
    that ``correct`` names.
    """
    return FormatError(
        f"a weight of shape {shape} in {name} cannot be read: {'; '.join(problems)}. Fetch the file again, or correct "
        f"{correct}"
    )
