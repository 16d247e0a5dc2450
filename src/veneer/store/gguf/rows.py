"""Rows of tensors in a GGUF file: their bytes, and their order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.disk.safetensors import StoredTensor
from veneer.errors import FormatError
from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.header import GgufTensor
from veneer.store.gguf.names import leaf_of


def stored_rows(tensor: GgufTensor, path: Path) -> StoredTensor:
    """Return a tensor in the file as raw bytes: uint8 (rows, bytes of a row), not yet read."""
    n_rows = math.prod(tensor.shape[:-1])
    shape = (n_rows, tensor.n_bytes // max(1, n_rows))
    return StoredTensor(tensor.name, path, torch.uint8, shape, tensor.start, tensor.n_bytes)


def joined(family: GgufFamily, name: str, shape: tuple[int, ...], tensors: Sequence[tuple[str, Tensor]]) -> Tensor:
    """Return a parameter's values from its tensors in the file, given with their names and with rows in the model's
    order.

    Raises FormatError if their shapes do not give the parameter's.
    """
    views, parts = [part for _, part in family.parts(name)] or [_whole], list[Tensor]()
    for leaf, tensor in ((leaf_of(each), values) for each, values in tensors):
        parts.append(tensor.mT if leaf in family.turned else tensor)
    if len(parts) == 1 and parts[0].numel() == math.prod(shape):
        return parts[0].reshape(shape)  # a file may hold a row as a vector
    whole = torch.empty(shape, dtype=parts[0].dtype, device="cpu")
    places = [view(whole) for view in views]
    if [place.shape for place in places] != [part.shape for part in parts]:
        told = " and ".join(f"{each} {tuple(values.shape)}" for each, values in tensors)
        raise FormatError(f"the file's {told} do not give the model's {name}, which has the shape {shape}")
    for place, part in zip(places, parts, strict=True):
        place.copy_(part)
    return whole


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def places_of_rows(family: GgufFamily, leaf: str, n_rows: int, config: Any) -> Tensor:
    """Return for each row of a parameter its index in the file's tensor."""
    return torch.argsort(family.rows(leaf, torch.arange(n_rows, device="cpu")[:, None], config).reshape(-1))
