"""Parameters of a model as a GGUF file holds them: where they lie, and their values, read one at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.errors import FormatError
from veneer.ops.ggml import dequantize_ggml
from veneer.ops.ggml_types import GGML_TYPES
from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.header import GgufTensor
from veneer.store.gguf.names import leaf_of, places_of
from veneer.store.gguf.rows import joined, places_of_rows, stored_rows

Places = dict[str, list[str]]
"""The tensors of a file by the names of the model's parameters; several where a parameter is made of several."""


@dataclass(frozen=True)
class GgufParameter:
    """Parameter of a model in a GGUF file, as `StoredTensor` is one in a safetensors file.

    ``dtype`` is that of a dense copy; values are read in float32. The layout of ``tensors`` follows from ``family`` and
    ``config``. Several tensors are joined along the second axis.
    """

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    tensors: tuple[GgufTensor, ...]
    family: GgufFamily
    config: Any

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def kind(self) -> str | None:
        """ggml's type of a matrix whose blocks can be used in place; None for all others."""
        [*others, tensor] = self.tensors
        is_matrix = not others and len(self.shape) == len(tensor.shape) == 2
        return tensor.type if is_matrix and GGML_TYPES[tensor.type].block > 1 else None

    @property
    def is_coded_stack(self) -> bool:
        """Return True for stacked experts (n, out, in) that can be used in place, if some of them are quantized."""
        stacked = len(self.shape) == 3 and all(len(tensor.shape) == 3 for tensor in self.tensors)
        in_blocks = any(GGML_TYPES[tensor.type].block > 1 for tensor in self.tensors)
        return stacked and in_blocks and not self.is_turned and self.order is None

    @cached_property
    def order(self) -> Tensor | None:
        """Index in the file of each row of a matrix; None if the rows are in the model's order."""
        [tensor, *_] = self.tensors
        places = places_of_rows(self.family, leaf_of(tensor.name), tensor.shape[0], self.config)
        return None if torch.equal(places, torch.arange(len(places), device="cpu")) else places

    @property
    def is_turned(self) -> bool:
        """Return True if the model has the transpose of the file's matrix."""
        return leaf_of(self.tensors[0].name) in self.family.turned

    def read(self) -> Tensor:
        """Return the parameter. Raises FormatError if the file is truncated."""
        parts = [(each.name, self._in_order(torch.cat(list(self._rows(each, math.inf))))) for each in self.tensors]
        return joined(self.family, self.name, self.shape, parts).contiguous()

    def blocks(self, n_values: int) -> Iterator[Tensor]:
        """Yield the rows (k, …) of the parameter in order, in blocks of about ``n_values`` values.

        If the file has the rows in another order, the whole parameter is read first.
        """
        [tensor, *others] = self.tensors
        if (
            len(self.shape) == 2
            and tensor.shape == self.shape
            and not (others or self.is_turned or self.order is not None)
        ):
            yield from self._rows(tensor, n_values)
        else:
            yield from torch.split(self.read(), max(1, n_values * self.shape[0] // math.prod(self.shape)))

    def _rows(self, tensor: GgufTensor, n_values: float) -> Iterator[Tensor]:
        """Yield a tensor's values in the file's order, in groups of rows with about ``n_values`` values. A tensor of
        three dimensions is yielded whole.
        """
        stored, less = stored_rows(tensor, self.path), self._less(tensor)
        n_bytes = min(stored.nbytes, n_values * stored.shape[1] // tensor.shape[-1])
        if len(tensor.shape) > 2:
            n_bytes = stored.nbytes
        for packed in stored.blocks(int(n_bytes)):
            values = dequantize_ggml(packed, tensor.type)
            yield (values - less if less else values).reshape(-1, *tensor.shape[1:])

    def _less(self, tensor: GgufTensor) -> int:
        return int(self.family.plus_one and leaf_of(tensor.name).endswith("norm.weight"))

    def _in_order(self, values: Tensor) -> Tensor:
        return values if self.order is None else values[self.order]


def placed_parameters(
    path: Path,
    places: Mapping[str, list[str]],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, GgufTensor],
    *,
    family: GgufFamily,
    config: Any,
    dtype: torch.dtype,
) -> dict[str, GgufParameter]:
    """Return the parameters with these ``shapes``, by the model's names. ``places`` gives the names of each one's
    ``tensors`` in the file.

    Raises FormatError if a parameter and its tensors do not fit.
    """
    found, problems = {}, []
    for name, shape in shapes.items():
        own = GgufParameter(name, path, dtype, shape, tuple(tensors[each] for each in places[name]), family, config)
        values = sum(math.prod(tensor.shape) for tensor in own.tensors)
        if values != math.prod(own.shape):
            told = ", ".join(f"{tensor.name} {tensor.shape}" for tensor in own.tensors)
            problems.append(f"{name} is {own.shape}, and {told} in the file")
        problems += [
            f"{tensor.name} {tensor.shape}: {wrong}" for tensor in own.tensors if (wrong := _undivided(tensor))
        ]
        found[name] = own
    if problems:
        raise FormatError(f"{path}: {'; '.join(problems)}. Take the model's own folder of safetensors instead.")
    return found


def _undivided(tensor: GgufTensor) -> str:
    """Return the problem of a tensor whose rows do not divide into its type's blocks, or an empty text."""
    block = GGML_TYPES[tensor.type].block
    return f"rows of {tensor.shape[-1]} values are not divided by {tensor.type}'s blocks of {block}" * (
        tensor.shape[-1] % block > 0
    )


def places_in(model: Any, family: GgufFamily, config: Any, held: Mapping[str, GgufTensor], path: Path) -> Places:
    """Return the names of the file's tensors for each parameter of a model. Tied parameters have the same tensors.

    Raises FormatError for parameters that the file lacks.
    """
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    found: Places = {}
    missing = []
    for names in groups.values():
        wanted = ([target for target, _ in places_of(family, config, name, model.base_model_prefix)] for name in names)
        places = next((targets for targets in wanted if targets and all(each in held for each in targets)), None)
        missing += names[:1] if places is None else []
        found |= dict.fromkeys(names, places or [])
    if missing:
        raise FormatError(f"{path} lacks the tensors of {missing[:5]}: it is not a whole model. Fetch it again")
    return found
