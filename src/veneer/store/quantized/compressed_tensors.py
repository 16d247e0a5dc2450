"""``quant_method: compressed-tensors``: groups of layers in whole numbers, FP8, NVFP4 or MXFP4."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from veneer.quant.fp8 import Fp8Spec
from veneer.quant.mxfp4 import BLOCK as MXFP4_BLOCK
from veneer.quant.mxfp4 import Mxfp4Spec
from veneer.quant.nvfp4 import BLOCK as NVFP4_BLOCK
from veneer.quant.nvfp4 import Nvfp4Spec
from veneer.quant.pack_quantized import BITS, PackQuantizedSpec
from veneer.quant.spec import StorageSpec
from veneer.store.quantized.layers import (
    Settings,
    StoredLayers,
    StoredParts,
    choice_problems,
    group_problems,
    is_count,
    matrix,
    names_problem,
    pattern_problems,
    require_known,
)

METHOD = "compressed-tensors"
Kind = Literal["packed", "bytes", "fp8", "nvfp4", "mxfp4"]
FORMATS: dict[str, Kind] = {
    "pack-quantized": "packed",
    "int-quantized": "bytes",
    "float-quantized": "fp8",
    "nvfp4-pack-quantized": "nvfp4",
    "mxfp4-pack-quantized": "mxfp4",
}
_PATTERN = "re:"
_NAIVE = "naive-quantized"  # of whole numbers or floats, as the group's type says
_WIDTHS: dict[Kind, tuple[str, tuple[int, ...]]] = {
    "packed": ("int", BITS), "bytes": ("int", BITS), "fp8": ("float", (8,)),
    "nvfp4": ("float", (4,)), "mxfp4": ("float", (4,)),
}  # fmt: skip
_READ = ("config_groups", "format", "ignore")
_SAID = ("quantization_status", "global_compression_ratio", "version", "kv_cache_scheme", "producer")
_WEIGHTS = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "actorder")
_OF_QUANTIZING = ("dynamic", "observer", "observer_kwargs", "scale_dtype", "zp_dtype")
_GROUP = ("targets", "weights", "input_activations", "output_activations", "format")


@dataclass(frozen=True)
class Group:
    """Settings of one group of layers.

    ``block`` is the size of an FP8 block. If ``size`` is None, a scale holds for a row.
    """

    targets: tuple[str, ...]
    kind: Kind
    bits: int
    size: int | None
    block: tuple[int, int] | None
    symmetric: bool
    ordered: bool

    def spec(self, shape: tuple[int, int], dtype: torch.dtype) -> StorageSpec:
        """Return the storage format of a weight."""
        if self.kind == "fp8":
            return Fp8Spec(
                shape, dtype, block=self.block, suffix="weight_scale", scale_dtype=torch.bfloat16, rounded=True
            )
        if self.kind == "nvfp4":
            return Nvfp4Spec(shape, dtype)
        if self.kind == "mxfp4":
            return Mxfp4Spec(shape, dtype)
        return PackQuantizedSpec(
            shape=shape,
            bits=self.bits,
            group=self.size,
            dtype=dtype,
            scale_dtype=torch.bfloat16,
            zeros=None if self.symmetric else torch.uint8,
            ordered=self.ordered,
            packed=self.kind == "packed",
        )

    @property
    def label(self) -> str:
        """Format in a few words."""
        if self.kind in ("nvfp4", "mxfp4"):
            return self.kind.upper()
        what = "FP8" if self.kind == "fp8" else f"{self.bits} bits"
        size = "blocks of {} x {}".format(*self.block) if self.block else "a scale a row or matrix"
        return f"{what}, {size if self.size is None else f'groups of {self.size}'}"


@dataclass(frozen=True)
class CompressedLayers(StoredLayers):
    """Settings of a checkpoint's layers in several groups. The layers in ``ignore`` are dense."""

    parts: ClassVar[frozenset[str]] = frozenset(
        {"weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"}
        | {"weight_global_scale", "input_scale", "input_zero_point", "input_global_scale", "output_scale"}
    )
    marks: ClassVar[frozenset[str]] = frozenset({"weight_scale"})
    skips_head: ClassVar[bool] = False

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    activations: bool

    @property
    def label(self) -> str:
        return f"compressed-tensors, {'; '.join(dict.fromkeys(group.label for group in self.groups))}"

    @property
    def left_out(self) -> list[str] | None:
        return []

    @property
    def quantizes_activations(self) -> bool:
        return self.activations

    def spec(self, path: str, shape: tuple[int, int], dtype: torch.dtype) -> StorageSpec | None:
        group = None if any(_matches(pattern, path) for pattern in self.ignore) else self._group(path)
        return None if group is None else group.spec(shape, dtype)

    def shape(self, path: str, parts: StoredParts) -> tuple[int, int]:
        if "weight" in parts:
            return matrix(parts["weight"])
        if "weight_shape" in parts:
            o, i = parts["weight_shape"].read().tolist()
            return int(o), int(i)
        (o, width), group = matrix(parts["weight_packed"]), self._group(path) or self.groups[0]
        return o, width * (2 if group.kind in ("nvfp4", "mxfp4") else 32 // group.bits)

    def _group(self, path: str) -> Group | None:
        found = [group for group in self.groups if any(_matches(target, path) for target in group.targets)]
        # a name or pattern is more than the class of all layers
        named = [group for group in found if "Linear" not in group.targets]
        return next(iter((*named, *found)), None)


def read(settings: Settings) -> CompressedLayers:
    """Return the layers that the settings describe. Raises ConfigError for missing or unsupported settings."""
    given = settings.get("config_groups")
    problems = _names_problems(settings, "ignore")
    if not isinstance(given, Mapping) or not given:
        problems.append("config_groups must name at least one group of layers")
        given = {}
    groups = []
    for name, values in given.items():
        group, wrong = _group(values, settings.get("format"))
        problems += [f"{name}: {problem}" for problem in wrong]
        groups += [] if group is None else [group]
    sparse = settings.get("sparsity_config")
    if isinstance(sparse, Mapping) and sparse.get("format", "dense") != "dense":
        problems.append(f"sparsity_config={sparse.get('format')!r}: only dense weights can be read")
    require_known(METHOD, settings, (*_READ, *_SAID, "sparsity_config"), problems)
    activations = any(values.get("input_activations") for values in given.values())
    return CompressedLayers(tuple(groups), tuple(settings.get("ignore") or ()), activations)


def _group(values: Any, layout: object) -> tuple[Group | None, list[str]]:
    weights = values.get("weights") if isinstance(values, Mapping) else None
    if not isinstance(weights, Mapping):
        return None, ["it has no settings for weights"]
    problems = [f"{key} is unknown" for key in values if key not in _GROUP and values[key]]
    problems += [
        f"weights.{key} is unknown" for key in weights if key not in (*_WEIGHTS, *_OF_QUANTIZING) and weights[key]
    ]
    problems += _names_problems(values, "targets") + group_problems(weights)
    strategies = ("tensor", "channel", "group", "block", "tensor_group")
    problems += choice_problems(weights, symmetric=(True, False), strategy=strategies, type=("int", "float"))
    layout = values.get("format") or layout
    kind = FORMATS.get(str(layout))
    if layout == _NAIVE:
        kind = "fp8" if weights.get("type") == "float" else "bytes"
    if kind is None:
        return None, [*problems, f"format={layout!r} must be one of {[*FORMATS, _NAIVE]}"]
    number, widths = _WIDTHS[kind]
    problems += choice_problems(weights, type=(number,), num_bits=widths)
    problems += [] if weights.get("num_bits") else ["weights.num_bits is missing"]
    size, wanted = weights.get("group_size"), {"nvfp4": NVFP4_BLOCK, "mxfp4": MXFP4_BLOCK}.get(kind)
    if wanted is not None and size not in (None, wanted):
        problems.append(f"weights.group_size={size} must be {wanted}")
    block, wrong = _block(weights) if weights.get("strategy") == "block" else (None, [])
    if kind == "fp8" and weights.get("strategy") in ("group", "tensor_group"):
        wrong = [*wrong, f"weights.strategy={weights['strategy']!r} must be tensor, channel or block for FP8"]
    if problems + wrong:
        return None, problems + wrong
    return Group(
        targets=tuple(values.get("targets") or ("Linear",)),
        kind=kind,
        bits=weights["num_bits"],
        size=size if size and size > 0 else None,
        block=block,
        symmetric=bool(weights.get("symmetric", True)),
        ordered=weights.get("actorder") in ("group", "dynamic", True),
    ), []


def _block(weights: Settings) -> tuple[tuple[int, int] | None, list[str]]:
    given = weights.get("block_structure")
    sides = [int(side) for side in given.split("x") if side.isdigit()] if isinstance(given, str) else given
    if not isinstance(sides, list) or len(sides) != 2 or not all(map(is_count, sides)):
        return None, [f"weights.block_structure={given!r} must be two whole numbers, such as [128, 128]"]
    return (sides[0], sides[1]), []


def _names_problems(settings: Settings, key: str) -> list[str]:
    wrong = names_problem(settings, key)
    patterns = [] if wrong else [name for name in settings.get(key) or () if name.startswith(_PATTERN)]
    bad = [problem for name in patterns for problem in pattern_problems(name.removeprefix(_PATTERN))]
    return wrong + [f"{key}: {problem}" for problem in bad]


def _matches(target: str, path: str) -> bool:
    """Return True if a target of the config includes the layer at ``path``. A target is a path, a regular expression
    after ``re:``, or ``Linear``, which includes every layer.
    """
    if target.startswith(_PATTERN):
        return re.match(target.removeprefix(_PATTERN), path) is not None
    return target in ("Linear", path)
