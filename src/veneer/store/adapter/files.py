"""Adapter files, by name, read with every check that an untrusted file needs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from veneer.contract.file import WEIGHTS_FILE
from veneer.disk.safetensors import StoredTensor, read_all, read_header
from veneer.store.adapter.folder import entries_in
from veneer.store.checkpoint import is_finite

NETWORK_FILE = "prompt_encoder.safetensors"  # in a checkpoint: the network that makes what WEIGHTS_FILE holds
VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # those that adapters are trained in
WHOLE_DTYPES = (torch.int32, torch.int64, torch.float32)  # of indices; PEFT on Windows writes float32


def read_tensors(folder: Path, file: str = WEIGHTS_FILE) -> dict[str, Tensor]:
    """Return the tensors of a folder's ``adapter_model.safetensors``, or of another file, as views of one buffer.

    To keep only some of them, copy those, so that the buffer is freed. Raises FormatError as `read_headers` does.
    """
    return read_all(folder / file, read_headers(folder, file))


def read_headers(folder: Path, file: str = WEIGHTS_FILE) -> dict[str, StoredTensor]:
    """Return the tensors that an adapter file's header lists, by name; no value is read.

    Raises FormatError as `entries_in` does.
    """
    return entries_in(folder, file, read_header)


def unusable(tensors: Mapping[str, Tensor], whole: Collection[str] = ()) -> dict[str, str]:
    """Return the reasons that disqualify tensors as an adapter's values, by key: wrong dtype, NaN or infinity.

    ``whole``: the keys of tensors that must hold whole numbers.
    """
    found, together = {}, _is_finite_together(tensors)
    for key, value in tensors.items():
        dtypes = WHOLE_DTYPES if key in whole else VALUE_DTYPES
        if value.dtype not in dtypes:
            allowed = ", ".join(_name(dtype) for dtype in dtypes)
            found[key] = f"dtype {_name(value.dtype)}, but an adapter's values must have one of {allowed}"
        elif not together and not is_finite(value):
            found[key] = "holds NaN or infinity"
    return found


def _is_finite_together(tensors: Mapping[str, Tensor]) -> bool:
    """Return True if a single check of the tensors' shared memory shows that all values are finite.

    Return False without a check unless all tensors have one dtype and lie in the same CPU memory.
    """
    first = next(iter(tensors.values()), None)
    if first is None or not all(type(x) is Tensor and x.is_cpu and x.dtype == first.dtype for x in tensors.values()):
        return False
    memory = first.untyped_storage()
    if any(x.untyped_storage().data_ptr() != memory.data_ptr() for x in tensors.values()):
        return False
    return memory.nbytes() % first.dtype.itemsize == 0 and is_finite(torch.empty(0, dtype=first.dtype).set_(memory))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
