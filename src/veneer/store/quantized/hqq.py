"""``quant_method: hqq``: checkpoints that transformers saved with HQQ's layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from veneer.quant.hqq import BITS, PARTS, HqqSpec
from veneer.store.quantized.layers import (
    Settings,
    StoredLayers,
    StoredParts,
    choice_problems,
    group_problems,
    names_problem,
    require_known,
)

METHOD = "hqq"
_WEIGHTS = "weight_quant_params"
_WEIGHT_SETTINGS = ("nbits", "group_size", "axis", "channel_wise", "optimize", "round_zero", "view_as_float", "packing")


@dataclass(frozen=True)
class HqqLayers(StoredLayers):
    """Settings of a checkpoint's layers in HQQ.

    ``settings`` are those of each kind of layer (``self_attn.q_proj``) by name. The key None holds those of all layers.
    """

    parts: ClassVar[frozenset[str]] = PARTS
    marks: ClassVar[frozenset[str]] = frozenset({"W_q"})

    settings: Mapping[str | None, Mapping[str, Any]]
    names: tuple[str, ...] | None

    @property
    def label(self) -> str:
        return f"HQQ, {', '.join(map(str, sorted({each['nbits'] for each in self.settings.values()})))} bits"

    @property
    def left_out(self) -> list[str] | None:
        return None if self.names is None else list(self.names)

    def spec(self, path: str, shape: tuple[int, int], dtype: torch.dtype) -> HqqSpec | None:
        kinds = [name for name in self.settings if name is not None and path.endswith(f".{name}")]
        settings = self.settings.get(kinds[0] if kinds else None)
        if settings is None:
            return None
        group = settings.get("group_size")
        return HqqSpec(
            shape=shape,
            bits=settings["nbits"],
            group=None if group == -1 else group,
            dtype=dtype,
            scale_dtype=dtype,
            zeros=dtype,
        )

    def shape(self, path: str, parts: StoredParts) -> tuple[int, int]:
        o, i = parts["shape"].read().tolist()
        return int(o), int(i)


def read(settings: Settings) -> HqqLayers:
    """Return the layers that the settings describe. Raises ConfigError for missing or unsupported settings."""
    given = settings.get("quant_config")
    problems = names_problem(settings, "skip_modules")
    if not isinstance(given, Mapping) or not given:
        problems.append("quant_config is missing")
        given = {}
    kinds = {None: given} if _WEIGHTS in given else dict(given)
    found: dict[str | None, Mapping[str, Any]] = {}
    for name, values in kinds.items():
        weights = values.get(_WEIGHTS) if isinstance(values, Mapping) else None
        if not isinstance(weights, Mapping):
            problems.append(f"quant_config: {name or 'it'} has no {_WEIGHTS}")
            continue
        problems += _weight_problems(weights)
        scaled = [key for key in ("scale_quant_params", "zero_quant_params") if values.get(key)]
        problems += [f"{key} is set: scales and zeros must be numbers" for key in scaled]
        found[name] = weights
    require_known(METHOD, settings, ("quant_config", "skip_modules"), problems)
    names = settings.get("skip_modules")
    return HqqLayers(found, None if names is None else tuple(names))


def _weight_problems(weights: Settings) -> list[str]:
    problems = [f"{key} is unknown" for key in weights if key not in _WEIGHT_SETTINGS and weights[key]]
    problems += [] if "nbits" in weights else ["nbits is missing"]
    axis = choice_problems({"axis": weights.get("axis", 0)}, axis=(1,))
    problems += [f"{problem}: groups must lie along the inputs" for problem in axis]
    return [
        *problems,
        *choice_problems(weights, nbits=BITS, view_as_float=(False,), channel_wise=(True,)),
        *group_problems(weights),
    ]
