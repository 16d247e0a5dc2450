"""Rows of tensors in a GGUF file: their bytes, and their order."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.disk.safetensors import StoredTensor
from veneer.store.gguf.family import GgufFamily
from veneer.store.gguf.header import GgufTensor


def stored_rows(tensor: GgufTensor, path: Path) -> StoredTensor:
    """Return a tensor in the file as raw bytes: uint8 (rows, bytes of a row), not yet read."""
    n_rows = math.prod(tensor.shape[:-1])
    shape = (n_rows, tensor.n_bytes // max(1, n_rows))
    return StoredTensor(tensor.name, path, torch.uint8, shape, tensor.start, tensor.n_bytes)


def places_of_rows(family: GgufFamily, leaf: str, n_rows: int, config: Any) -> Tensor:
    """Return for each row of a parameter its index in the file's tensor."""
    return torch.argsort(family.rows(leaf, torch.arange(n_rows, device="cpu")[:, None], config).reshape(-1))
