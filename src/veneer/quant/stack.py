"""Frozen weights of a layer's experts in one stack: dense, or in the codes of one storage format.

Checkpoints store experts one by one, or stacked. In memory each tensor of the format has the experts as its first axis,
and an expert's weight is a view of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.errors import FormatError, listed
from veneer.quant.dense import DenseWeight
from veneer.quant.spec import Parts, StorageSpec
from veneer.records.frozen import FrozenWeight

PROBLEMS_TOLD = 4  # of experts with one problem each


@dataclass(frozen=True, slots=True)
class DenseStack:
    """Frozen weights ``W (experts, o, i)`` as one tensor. A module that stores the transposes passes a view."""

    tensor: Float[Tensor, "experts o i"]

    @property
    def shape(self) -> tuple[int, int, int]:
        n_experts, o, i = self.tensor.shape
        return n_experts, o, i

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def expert(self, number: int) -> FrozenWeight:
        return DenseWeight(self.tensor[number])

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "experts o i"]:
        return self.tensor if dtype is None else self.tensor.to(dtype)


@dataclass(frozen=True, slots=True)
class JoinedWeight:
    """Frozen weight ``W (o, i)`` made of several weights, whose rows follow one another: an expert's gate and up."""

    pieces: tuple[FrozenWeight, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(piece.shape[0] for piece in self.pieces), self.pieces[0].shape[1]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def matmul(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        return torch.cat([piece.matmul(x) for piece in self.pieces], dim=-1)

    def matmul_t(self, dy: Float[Tensor, "*batch o"]) -> Float[Tensor, "*batch i"]:
        parts = torch.split(dy, [piece.shape[0] for piece in self.pieces], dim=-1)
        first, *rest = (piece.matmul_t(part) for piece, part in zip(self.pieces, parts, strict=True))
        return sum(rest, first)

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "o i"]:
        return torch.cat([piece.dense(dtype) for piece in self.pieces])


@dataclass(frozen=True, slots=True)
class CodedWeights:
    """Frozen weights ``W (experts, o, i)`` of a layer's experts, in the codes that ``spec`` describes."""

    spec: StackSpec
    parts: Parts

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.spec.shape

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    def expert(self, number: int) -> FrozenWeight:
        pieces = [
            piece.bind({name: self.parts[numbered(name, k)][number] for name in piece.part_layout()})
            for k, piece in enumerate(self.spec.pieces)
        ]
        return pieces[0] if len(pieces) == 1 else JoinedWeight(tuple(pieces))

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "experts o i"]:
        return torch.stack([self.expert(number).dense(dtype) for number in range(self.shape[0])])


@dataclass(frozen=True, slots=True)
class StackSpec:
    """Storage format of the weights ``W (experts, o, i)`` of a layer's experts, without their tensors.

    An expert's matrix consists of one or more matrices (``pieces``), whose rows follow one another. A tensor ``p`` of
    piece k > 0 is named ``p_k``. On disk each expert has tensors of its own, ``{expert}.{name}.…`` below the path of
    the experts, with ``names`` for the pieces.
    """

    n_experts: int
    pieces: tuple[StorageSpec, ...]
    names: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (experts, o, i)."""
        return self.n_experts, sum(piece.shape[0] for piece in self.pieces), self.pieces[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of ``dense()``."""
        return self.pieces[0].dtype

    def part_layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return dtype and shape of each stored tensor by name, ``"weight"`` first."""
        return {
            numbered(name, k): (dtype, (self.n_experts, *shape))
            for k, piece in enumerate(self.pieces)
            for name, (dtype, shape) in piece.part_layout().items()
        }

    def quantize(self, weight: Float[Tensor, "experts o i"]) -> dict[str, Tensor]:
        """Return the stored tensors for the weights of all experts, quantized one by one. Raises the errors of the
        pieces.
        """
        made = [
            {
                numbered(name, k): part
                for k, rows in enumerate(torch.split(expert, [piece.shape[0] for piece in self.pieces]))
                for name, part in self.pieces[k].quantize(rows).items()
            }
            for expert in weight
        ]
        return _stacked(made)

    def parts_of(self, pieces: Sequence[Parts]) -> dict[str, Tensor]:
        """Return the stored tensors of the whole stack by name, given those of each piece, which have the experts as
        their first axis.
        """
        return {numbered(name, k): part for k, parts in enumerate(pieces) for name, part in parts.items()}

    def bind(self, parts: Parts) -> CodedWeights:
        """Return the frozen weights that these stored tensors make up."""
        return CodedWeights(self, parts)

    def owns(self, key: str) -> bool:
        """Return True if ``key``, a tensor's name below the path of the experts, may be part of the weights on disk."""
        number, _, rest = key.partition(".")
        name, _, part = rest.partition(".")
        return number.isdecimal() and name in self.names and self.pieces[self.names.index(name)].owns(part)

    def to_disk(self, parts: Parts) -> dict[str, Tensor]:
        """Return the tensors by their names below the path of the experts."""
        return {
            f"{number}.{name}.{key}": tensor.clone()
            for number in range(self.n_experts)
            for k, (name, piece) in enumerate(zip(self.names, self.pieces, strict=True))
            for key, tensor in piece.to_disk(
                {part: parts[numbered(part, k)][number] for part in piece.part_layout()}
            ).items()
        }

    def from_disk(self, tensors: Parts) -> tuple[StackSpec, dict[str, Tensor]]:
        """Return spec and stored tensors: the inverse of `to_disk`. Raises FormatError, which lists everything that
        does not fit.
        """
        held = _by_expert(tensors)
        problems: list[str] = []
        specs: list[tuple[StorageSpec, ...]] = []
        made: list[dict[str, Tensor]] = []
        for number in range(self.n_experts):
            found, parts = [], dict[str, Tensor]()
            for k, (name, piece) in enumerate(zip(self.names, self.pieces, strict=True)):
                try:
                    spec, own = piece.from_disk(held.get((number, name), {}))
                except FormatError as error:
                    problems.append(f"{number}.{name}: {error}")
                    continue
                found.append(spec)
                parts |= {numbered(part, k): tensor for part, tensor in own.items()}
            specs.append(tuple(found))
            made.append(parts)
        others = sorted({number for number, _ in held if number >= self.n_experts})
        if others:
            problems.append(
                f"the model has {self.n_experts} experts, and the files have tensors of expert {others[0]}: correct "
                "the number of experts in config.json, or fetch the files again"
            )
        if not problems:
            layouts = [[piece.part_layout() for piece in each] for each in specs]
            problems += [f"experts 0 and {n} are stored in different formats" for n in _unlike(layouts)]
        if problems:
            raise FormatError(listed(problems, most=PROBLEMS_TOLD))
        return replace(self, pieces=specs[0]), _stacked(made)


def numbered(part: str, piece: int) -> str:
    """Return the name of a stored tensor of piece number ``piece`` of an expert's matrix: ``part`` for piece 0,
    ``part_1`` for piece 1, and so on.
    """
    return f"{part}_{piece}" if piece else part


def _stacked(made: Sequence[Parts]) -> dict[str, Tensor]:
    return {name: torch.stack([parts[name] for parts in made]) for name in made[0]}


def _by_expert(tensors: Parts) -> dict[tuple[int, str], dict[str, Tensor]]:
    """Group tensors by expert and matrix: ``0.gate.codes`` becomes ``found[0, "gate"]["codes"]``."""
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, rest = key.partition(".")
        name, _, part = rest.partition(".")
        found.setdefault((int(number), name), {})[part] = tensor
    return found


def _unlike(layouts: Sequence[object]) -> Iterator[int]:
    return (number for number, layout in enumerate(layouts) if layout != layouts[0])
