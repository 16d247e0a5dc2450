"""Merging into a quantized base that stays quantized, and the error this adds to the update."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from veneer.adapters import merging
from veneer.errors import ConfigError
from veneer.model.adapted.linear import AdaptedSite, wide
from veneer.model.adapted.parameters import AdaptedParameters
from veneer.model.adapted.state import AdapterState
from veneer.model.attach.attach import adapted_layers, adapted_stacks
from veneer.model.quantized.module import CodedModule
from veneer.model.quantized.quant_linear import QuantLinear
from veneer.model.quantized.stack import coded_stacks

IN_16_BITS = "Without requantize=True the result is 16-bit and loses next to nothing"


@dataclass(frozen=True, slots=True)
class Survival:
    """Share of an update that survives quantizing the merged weight.

    ``relative_size`` is the update's Frobenius norm over the weight's. ``share`` is the cosine between the update and
    the actual change: 1 if all of it survives, 0 if nothing does. ``gain`` is the projection of the actual change on
    the update, over the update's norm. Below 1 the update acts more weakly than trained.
    """

    path: str
    relative_size: float
    share: float
    gain: float


def survival(
    path: str, before: Float[Tensor, "*e o i"], wanted: Float[Tensor, "*e o i"], after: Float[Tensor, "*e o i"]
) -> Survival:
    """Compare the wanted update ``wanted - before`` with the actual ``after - before``. A zero update survives
    completely.
    """
    sums = SurvivalSums()
    sums.add(before, wanted, after)
    return sums.survival(path)


@dataclass(slots=True)
class SurvivalSums:
    """Sums over the values of a weight, to which the weight's parts are added one after another.

    ``weight``, ``update`` and ``change`` are sums of squares; ``dot`` is the sum of products of update and change.
    """

    weight: float = 0.0
    update: float = 0.0
    change: float = 0.0
    dot: float = 0.0

    def add(
        self, before: Float[Tensor, "*e o i"], wanted: Float[Tensor, "*e o i"], after: Float[Tensor, "*e o i"]
    ) -> None:
        """Add a part of the weight: its values before, the wanted values, and the actual values after."""
        update, change = wanted - before, after - before
        self.weight += float(before.square().sum())
        self.update += float(update.square().sum())
        self.change += float(change.square().sum())
        self.dot += float((update * change).sum())

    def survival(self, path: str) -> Survival:
        """Return the share of the update of the whole weight that survives."""
        if self.update == 0:
            return Survival(path, 0.0, 1.0, 1.0)
        share = self.dot / math.sqrt(self.update * self.change) if self.change > 0 else 0.0
        relative = math.sqrt(self.update / self.weight) if self.weight > 0 else math.inf
        return Survival(path, relative, share, self.dot / self.update)


@torch.no_grad()
def merge_requantized(
    model: nn.Module, state: AdapterState, names: tuple[str, ...], check_finite: bool = False
) -> list[Survival]:
    """Merge adapters into the base and requantize in the same format. This cannot be undone.

    On an error nothing is changed. Raises the errors of `merging.merge`, NonFiniteError if a merged weight cannot be
    quantized, and ConfigError if no merged layer is quantized.
    """
    with merging.merging_with(model, state, names) as wanted:
        made = _new_codes(model, wanted)
        for path, module in merging.holding(model, wanted):
            coded = {key for key in ("weight", *coded_stacks(module)) if _name(path, key) in made}
            values = {key: value for key, value in module.folded(wanted).items() if key not in coded}
            if check_finite:
                merging.require_finite(path, values, wanted)
            module.replace(values)
    for path, (parts, _) in made.items():
        layer = cast(CodedModule, model.get_submodule(path))
        layer.fill(layer.spec, parts)
    return [found for _, found in made.values()]


def describe(report: Sequence[Survival], advice: str = IN_16_BITS) -> str:
    """Return the report as text: the median, the worst, and ``advice`` if little of the updates survives."""
    middle = statistics.median(s.share for s in report)
    worst = min(report, key=lambda s: s.share)
    size = statistics.median(s.relative_size for s in report)
    text = (
        f"re-quantized {len(report)} layers after merging an update of {size:.2%} of their weights (median): "
        f"{middle:.0%} of it survives (median cosine between the update and the change), "
        f"{worst.share:.0%} in {worst.path}"
    )
    return f"{text}. {advice}" if middle < 0.9 else text


def _new_codes(model: nn.Module, names: tuple[str, ...]) -> dict[str, tuple[dict[str, Tensor], Survival]]:
    """Return the new tensors of each quantized layer or stack of experts that adapters change, with the share of the
    update that survives.
    """
    layers = {
        path: layer
        for path, layer in adapted_layers(model).items()
        if layer.has_codes and any(name in layer.adapters for name in names)
    }
    stacks = {
        _name(path, key): (module, key)
        for path, module in adapted_stacks(model).items()
        for key in coded_stacks(module)
        if any(key in module.changed(name) for name in names)
    }
    if not layers and not stacks:
        raise ConfigError("requantize=True, but no layer that the adapters change is quantized: leave it out")
    made = {path: _merged_codes(path, layer, names) for path, layer in layers.items()}
    return made | {path: _merged_stack(path, *place, names) for path, place in stacks.items()}


def _merged_codes(path: str, layer: AdaptedSite, names: tuple[str, ...]) -> tuple[dict[str, Tensor], Survival]:
    """Quantize the sum of a layer's weight and update from float32. Return the new tensors, and the share of the update
    that survives.
    """
    coded = cast(QuantLinear, layer)
    wanted, _ = layer.folded_weight(names, torch.float32)
    parts = coded.spec.quantize(wanted)
    return parts, survival(path, wide(coded.frozen_format()), wanted, wide(coded.spec.bind(parts)))


def _merged_stack(
    path: str, module: AdaptedParameters, key: str, names: tuple[str, ...]
) -> tuple[dict[str, Tensor], Survival]:
    """Do the same as `_merged_codes` for a stack of experts."""
    stack = coded_stacks(module)[key]
    wanted = module.folded_stack(key, names, torch.float32)
    parts = stack.stack_spec.quantize(wanted)
    before, after = (each.dense(torch.float32) for each in (stack.coded(), stack.stack_spec.bind(parts)))
    return parts, survival(path, before, wanted, after)


def _name(path: str, key: str) -> str:
    """Return the path of the quantized module that replaces a parameter of the module at ``path``."""
    return path if key == "weight" else f"{path}.{key}"
