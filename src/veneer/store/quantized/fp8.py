"""``quant_method: fp8``: blocks of 8-bit floats with ``weight_scale_inv`` (DeepSeek, Qwen), or a scale a matrix, which
AutoFP8 names ``weight_scale``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from veneer.quant.fp8 import MATRIX_SCALE, Fp8Spec
from veneer.store.quantized.layers import (
    Settings,
    StoredLayers,
    StoredParts,
    choice_problems,
    is_count,
    matrix,
    names_problem,
    require_known,
)

METHOD = "fp8"
SCALES = ("weight_scale_inv", MATRIX_SCALE)
_LEFT_OUT = ("modules_to_not_convert", "ignored_layers")
_KNOWN = (
    *_LEFT_OUT,
    "activation_scheme",
    "weight_block_size",
    "modules_to_convert",
    "scale_fmt",
    "fmt",
    "expert_dtype",
)


@dataclass(frozen=True)
class Fp8Layers(StoredLayers):
    """Settings of a checkpoint's layers in FP8. If ``block`` is None, a scale holds for a whole matrix or row."""

    parts: ClassVar[frozenset[str]] = frozenset({"weight", *SCALES, "activation_scale", "input_scale"})
    marks: ClassVar[frozenset[str]] = frozenset(SCALES)

    block: tuple[int, int] | None
    names: tuple[str, ...] | None
    kind: torch.dtype = torch.float8_e4m3fn

    @property
    def label(self) -> str:
        return f"FP8, {'a scale a row or matrix' if self.block is None else 'blocks of {} x {}'.format(*self.block)}"

    @property
    def left_out(self) -> list[str] | None:
        return None if self.names is None else list(self.names)

    @property
    def quantizes_activations(self) -> bool:
        return True

    def spec(self, path: str, shape: tuple[int, int], dtype: torch.dtype) -> Fp8Spec:
        return Fp8Spec(shape, dtype, self.kind, self.block, scale_shape=() if self.block is None else None)

    def shape(self, path: str, parts: StoredParts) -> tuple[int, int]:
        return matrix(parts["weight"])


def read(settings: Settings) -> Fp8Layers:
    """Return the layers that the settings describe. Raises ConfigError for missing or unsupported settings."""
    block = settings.get("weight_block_size", [128, 128])
    problems = names_problem(settings, *_LEFT_OUT)
    if block is not None and not (isinstance(block, list) and len(block) == 2 and all(map(is_count, block))):
        problems.append(f"weight_block_size={block!r} must be two whole numbers, or null")
    problems += choice_problems(
        settings,
        activation_scheme=("dynamic", "static"),
        scale_fmt=("float", "ue8m0"),
        fmt=("e4m3", "e5m2"),
        expert_dtype=("fp8",),
    )
    if settings.get("modules_to_convert"):
        problems.append("modules_to_convert: only linear layers are read in FP8")
    require_known(METHOD, settings, _KNOWN, problems)
    names = next((settings[key] for key in _LEFT_OUT if settings.get(key) is not None), None)
    return Fp8Layers(
        block=None if block is None else (block[0], block[1]),
        names=None if names is None else tuple(names),
        kind=torch.float8_e5m2 if settings.get("fmt") == "e5m2" else torch.float8_e4m3fn,
    )
