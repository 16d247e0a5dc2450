"""``quant_method: awq``: AutoAWQ's checkpoints in its layout ``gemm``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from veneer.quant.awq import BITS, PARTS, PER_WORD, AwqSpec
from veneer.store.quantized.layers import (
    Settings,
    StoredLayers,
    StoredParts,
    choice_problems,
    group_problems,
    matrix,
    names_problem,
    require_known,
)

METHOD = "awq"
_READ = ("bits", "w_bit", "group_size", "q_group_size", "version", "format", "zero_point", "modules_to_not_convert")
_OF_RUNNING = ("backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config", "desc_act", "sym", "meta")


@dataclass(frozen=True)
class AwqLayers(StoredLayers):
    """Settings of a checkpoint's layers in AWQ. If ``group`` is None, a group is a whole row."""

    parts: ClassVar[frozenset[str]] = PARTS
    marks: ClassVar[frozenset[str]] = frozenset({"qweight"})

    group: int | None
    names: tuple[str, ...] | None

    @property
    def label(self) -> str:
        return f"AWQ, 4 bits, {'a group a row' if self.group is None else f'groups of {self.group}'}"

    @property
    def left_out(self) -> list[str] | None:
        return None if self.names is None else list(self.names)

    def spec(self, path: str, shape: tuple[int, int], dtype: torch.dtype) -> AwqSpec:
        return AwqSpec(shape=shape, group=self.group, dtype=dtype)

    def shape(self, path: str, parts: StoredParts) -> tuple[int, int]:
        i, words = matrix(parts["qweight"])
        return words * PER_WORD, i


def read(settings: Settings) -> AwqLayers:
    """Return the layers that the settings describe. Raises ConfigError for missing or unsupported settings."""
    said = {key: value.lower() if isinstance(value, str) else value for key, value in settings.items()}
    key = "q_group_size" if "q_group_size" in settings else "group_size"
    problems = choice_problems(said, bits=(BITS,), w_bit=(BITS,), version=("gemm",), format=("gemm",))
    problems += choice_problems(said, zero_point=(True,))
    problems += group_problems(settings, key) + names_problem(settings, "modules_to_not_convert")
    require_known(METHOD, settings, (*_READ, *_OF_RUNNING), problems)
    group, names = settings.get(key, 128), settings.get("modules_to_not_convert")
    return AwqLayers(None if group in (-1, None) else group, None if names is None else tuple(names))
