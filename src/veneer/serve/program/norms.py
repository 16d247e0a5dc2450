"""Norm of a program on a model's weights, and on those that adapter versions have instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.model.blueprint.parts import Norm
from veneer.ops.grouped_low_rank import AdapterRuns
from veneer.ops.norm import layer_norm_forward, rms_norm_forward
from veneer.serve.program.effects import Effects


@dataclass(frozen=True, slots=True)
class BoundNorm:
    """Norm on a model's weights; ``own`` are the base's weight and bias."""

    model: PreTrainedModel
    norm: Norm
    effects: Mapping[str, Effects]
    own: tuple[Tensor | None, Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        held = self.model.get_submodule(self.norm.path)._parameters
        weight = held["weight"] if self.norm.weight else torch.ones(self.norm.shape, device=self.model.device)
        bias = held["bias"] if self.norm.bias else None
        if self.norm.kind == "layer" and bias is None:
            bias = torch.zeros_like(cast(Tensor, weight))
        object.__setattr__(self, "own", (weight, bias))

    def __call__(self, x: Tensor, versions: tuple[str, ...], runs: AdapterRuns) -> Tensor:
        y = self.normed(x, *self.own)
        for number, start, stop in runs.runs:
            own = self.instead(self.effects[versions[number]])
            if own is not None:
                y[start:stop] = self.normed(x[start:stop], *own)
        return y

    def instead(self, effects: Effects) -> tuple[Tensor | None, Tensor | None] | None:
        """Return the weight and bias that replace the base's for a version; None if it replaces neither."""
        keys = [(self.norm.path, name) for name in ("weight", "bias")]
        if effects.whole.keys().isdisjoint(keys):
            return None
        weight, bias = (effects.whole.get(key, own) for key, own in zip(keys, self.own, strict=True))
        return weight, bias

    def normed(self, x: Tensor, weight: Any, bias: Any) -> Tensor:
        norm = self.norm
        if len(norm.shape) > 1:  # a weight for each head
            flat = torch.ones_like(weight[0])
            y = self._flat(x, flat, torch.zeros_like(flat)) * (weight + norm.offset)
            return cast(Tensor, (y if bias is None else y + bias).to(x.dtype))
        return self._flat(x, weight, bias)

    def _flat(self, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        norm = self.norm
        if norm.kind == "layer":
            return layer_norm_forward(x, weight + norm.offset if norm.offset else weight, bias, norm.eps)[0]
        y, _ = rms_norm_forward(x, weight, norm.eps, norm.offset if len(norm.shape) == 1 else 0.0)
        return y
