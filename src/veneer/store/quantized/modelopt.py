"""``quant_method: modelopt``: NVIDIA's checkpoints in NVFP4, and in FP8 with a scale a matrix."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import translate
from typing import ClassVar

import torch

from veneer.quant.fp8 import Fp8Spec
from veneer.quant.nvfp4 import Nvfp4Spec
from veneer.quant.spec import StorageSpec
from veneer.store.quantized.layers import (
    Settings,
    StoredLayers,
    StoredParts,
    choice_problems,
    matrix,
    names_problem,
    require_known,
)

METHOD = "modelopt"
_ALGORITHMS = ("NVFP4", "FP8")
_KNOWN = (
    "quant_algo",
    "ignore",
    "exclude_modules",
    "config_groups",
    "kv_cache_scheme",
    "kv_cache_quant_algo",
    "producer",
)


@dataclass(frozen=True)
class ModeloptLayers(StoredLayers):
    """Settings of a checkpoint's layers in one format.

    Layers that match a name or a wildcard of ``ignore`` are dense.
    """

    parts: ClassVar[frozenset[str]] = frozenset(
        {"weight", "weight_scale", "weight_scale_2", "input_scale", "k_scale", "v_scale"}
    )
    marks: ClassVar[frozenset[str]] = frozenset({"weight_scale"})

    algorithm: str
    ignore: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"ModelOpt, {self.algorithm}"

    @property
    def left_out(self) -> list[str] | None:
        return []

    @property
    def quantizes_activations(self) -> bool:
        return True

    def spec(self, path: str, shape: tuple[int, int], dtype: torch.dtype) -> StorageSpec | None:
        if any(re.match(translate(name), path) for name in self.ignore):
            return None
        if self.algorithm == "NVFP4":
            return Nvfp4Spec(shape, dtype, divides=False)
        return Fp8Spec(shape, dtype, block=None, suffix="weight_scale", scale_shape=())

    def shape(self, path: str, parts: StoredParts) -> tuple[int, int]:
        o, width = matrix(parts["weight"])
        return o, width * (2 if self.algorithm == "NVFP4" else 1)


def read(settings: Settings) -> ModeloptLayers:
    """Return the layers that the settings describe. Raises ConfigError for missing or unsupported settings."""
    algorithm = settings.get("quant_algo")
    problems = choice_problems({"quant_algo": algorithm or "missing"}, quant_algo=_ALGORITHMS)
    problems += names_problem(settings, "ignore", "exclude_modules")
    require_known(METHOD, settings, _KNOWN, problems)
    return ModeloptLayers(str(algorithm), tuple(settings.get("ignore") or settings.get("exclude_modules") or ()))
