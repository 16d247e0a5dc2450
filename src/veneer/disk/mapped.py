"""Memory-mapped file that notices if the file changes: reading pages of a truncated file would end the process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from veneer.errors import FormatError


class MappedFile:
    """File mapped copy-on-write: its pages are in the system's cache, and writes never reach the file.

    A file that is replaced by a rename stays mapped as it was. Copies of the object are the object itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        self._stamp = self._now()
        self._bytes: Any = np.memmap(self._file, dtype=np.uint8, mode="c") if self._stamp[0] else np.empty(0, np.uint8)

    def tensor(self, start: int, n_bytes: int) -> UInt8[Tensor, " n_bytes"]:
        """Return bytes of the file, mapped. Raises FormatError if the file ends before them."""
        if start + n_bytes > self._stamp[0]:
            raise FormatError(
                f"{self.path} ends at byte {self._stamp[0]:,}, within a tensor that reaches to byte "
                f"{start + n_bytes:,}: the file is truncated. Download it again."
            )
        return torch.from_numpy(self._bytes[start : start + n_bytes])

    def require_unchanged(self) -> None:
        """Raise FormatError if the file was truncated or written to since it was mapped."""
        now = self._now()
        if now != self._stamp:
            raise FormatError(
                f"{self.path} was written to while its weights were in use (it had {self._stamp[0]:,} bytes, and has "
                f"{now[0]:,}): results are wrong from now on. Load the model again, and replace such files by a "
                "rename."
            )

    def _now(self) -> tuple[int, int]:
        # no time of the status: removing the file's name changes it, and leaves what is mapped
        stat = os.fstat(self._file.fileno())
        return stat.st_size, stat.st_mtime_ns

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self
