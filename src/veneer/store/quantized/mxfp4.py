"""``quant_method: mxfp4``: gpt-oss, whose experts alone are quantized, stacked in ``…_blocks`` and ``…_scales``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from veneer.errors import FormatError
from veneer.quant.mxfp4 import BLOCK
from veneer.quant.mxfp4_stack import Mxfp4StackSpec
from veneer.store.quantized.layers import Settings, StoredLayers, StoredParts, names_problem, require_known

METHOD = "mxfp4"
SUFFIXES = ("_blocks", "_scales")
_LEFT_OUT = "modules_to_not_convert"


@dataclass(frozen=True)
class Mxfp4Layers(StoredLayers):
    """Storage of a checkpoint whose experts are in MXFP4 and whose linear layers are dense.

    The key of each part of a stack is the last component of its tensor's name.
    """

    parts: ClassVar[frozenset[str]] = frozenset()
    marks: ClassVar[frozenset[str]] = frozenset(SUFFIXES)

    names: tuple[str, ...] | None

    @property
    def label(self) -> str:
        return "MXFP4, experts in blocks of 32"

    @property
    def left_out(self) -> list[str] | None:
        return None if self.names is None else list(self.names)

    def spec(self, path: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
        return None

    def stack(self, name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Mxfp4StackSpec:
        return Mxfp4StackSpec.of(name.rpartition(".")[2], shape, dtype)

    def is_stack(self, layer: str) -> bool:
        return True

    def shape(self, path: str, parts: StoredParts) -> tuple[int, ...]:
        held = next((tensor for part, tensor in parts.items() if part.endswith("_scales")), None)
        if held is None or len(held.shape) != 3:
            found = "missing" if held is None else str(held.shape)
            raise FormatError(
                f"{parts[min(parts)].path}: {path}_scales is {found}, it should be (experts, o, blocks). Fetch "
                "the file again"
            )
        n_experts, o, n_blocks = held.shape
        return n_experts, o, n_blocks * BLOCK

    def grouped(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        for name in names:
            for suffix in SUFFIXES:
                if name.endswith(suffix):
                    found.setdefault(name.removesuffix(suffix), {})[name.rpartition(".")[2]] = name
        return found


def read(settings: Settings) -> Mxfp4Layers:
    """Return the layers that the settings describe. Raises ConfigError for missing or unsupported settings."""
    require_known(METHOD, settings, (_LEFT_OUT,), names_problem(settings, _LEFT_OUT))
    names = settings.get(_LEFT_OUT)
    return Mxfp4Layers(None if names is None else tuple(names))
