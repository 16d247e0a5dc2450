"""The files of an adapter: written atomically, read with every check that a stranger's file deserves."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from veneer.errors import DiskError, FormatError

WEIGHTS_FILE = "adapter_model.safetensors"
NETWORK_FILE = "prompt_encoder.safetensors"  # in a checkpoint: the network that makes what WEIGHTS_FILE holds
PICKLE_FILE = "adapter_model.bin"
VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # those that adapters are trained in


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by new content: a crash or a full disk on the way leaves the old file as it was.

    Raises DiskError where the content cannot be written.
    """
    write_together(path.parent, {path.name: content})


def write_together(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files of a folder by name: all are on disk before the first takes its place.

    Where one cannot be written, the old files are as they were, and folders that were made for them go again. Raises
    DiskError.
    """
    made = make_folder(folder)
    temporary: dict[str, Path] = {}
    name = ""
    try:
        for name, content in contents.items():
            temporary[name] = _beside(folder / name)
            _write_through(temporary[name], content)
        for name, path in temporary.items():
            path.replace(folder / name)
    except BaseException as error:
        for path in (*temporary.values(), *made):
            with contextlib.suppress(OSError):
                path.rmdir() if path in made else path.unlink()
        if not isinstance(error, OSError):
            raise
        raise DiskError(
            f"{folder / name} could not be written ({error.strerror}). What was there before is untouched: "
            "make room or choose another disk, and run it again"
        ) from error
    _sync_folder(folder)


def make_folder(folder: Path) -> list[Path]:
    """Make a folder, and those above it, if there is none; returns those made, innermost first. Raises DiskError."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"{folder} cannot be made a folder: {error.strerror}") from error
    return made


def _beside(path: Path) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    return Path(name)


def _write_through(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    path.chmod(0o666 & ~_umask())


def tensors_to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file: contiguous copies on the CPU, no two of them sharing memory."""
    copies = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    return cast(bytes, save(copies, {"format": "pt"}))


def read_tensors(folder: Path, file: str = WEIGHTS_FILE) -> dict[str, Tensor]:
    """The tensors of ``adapter_model.safetensors``, or of another file, in a folder.

    Raises FormatError where it is missing, a pickle, truncated, damaged, or its header lies.
    """
    path = folder / file
    if not path.is_file():
        if (folder / PICKLE_FILE).is_file():
            raise FormatError(
                f"{folder} holds {PICKLE_FILE}, a pickle, which can run any code when it is opened; only "
                f"{WEIGHTS_FILE} is read. Where you trust it, convert it with PEFT: load it there and save it again."
            )
        raise FormatError(f"{folder} holds no {file}: it is not an adapter, or it was not saved to the end")
    try:
        return cast("dict[str, Tensor]", load_file(path))
    except SafetensorError as error:
        raise FormatError(f"{path} is damaged or was cut off ({error}); save or download it again") from error


def unusable(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Why tensors cannot be an adapter's values, by key: they are of another dtype, or hold a NaN or an infinity."""
    found = {}
    for key, value in tensors.items():
        if value.dtype not in VALUE_DTYPES:
            allowed = ", ".join(_name(dtype) for dtype in VALUE_DTYPES)
            found[key] = f"dtype {_name(value.dtype)} where an adapter's values are in one of {allowed}"
        elif not torch.isfinite(value).all():
            found[key] = "holds NaN or infinity"
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _umask() -> int:
    mask = os.umask(0o077)  # while it is read, other threads make files that are too closed, not too open
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system can sync a folder."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
