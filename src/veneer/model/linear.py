"""Linear layers with adapters. A layer becomes adapted in place: its class changes, the module and its weight stay."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.core.frozen import FrozenWeight
from veneer.core.linear import apply_linear, compose_linear, lowrank, without_lowrank
from veneer.core.method import LinearMethod
from veneer.core.records import LinearDelta
from veneer.core.sites import LinearSite
from veneer.model.inplace import InPlace, change_class, restore_class
from veneer.model.state import AdapterState
from veneer.quant.dense import DenseWeight


class AdaptedLinear(InPlace, nn.Module):
    """Mixed in front of a linear layer's class by `adapt_linear`; ``adapters`` holds the parameters by adapter name."""

    name_prefix: ClassVar[str] = "Adapted"

    site_name: str
    adapters: nn.ModuleDict
    adapter_state: AdapterState

    def forward(self, x: Tensor) -> Tensor:
        names = [name for name in self.adapter_state.acting() if name in self.adapters]
        if not names:
            return cast(Tensor, super().forward(x))
        site = self.site()
        if len(names) > 1 and self.training:
            return self._sum_in_training(x, site, names)
        delta = compose_linear([self.record(name, site) for name in names], site.bias)
        dropped = self._dropped(x, names[0]) if self.training else None
        return apply_linear(delta, x, self.frozen_weight(), site.bias, dropped)

    def record(self, name: str, site: LinearSite | None = None) -> LinearDelta:
        """What adapter ``name`` means here."""
        return self._method(name).lower(site or self.site(), _parameters(self.adapters[name]))

    def site(self) -> LinearSite:
        """This layer described, with its weight."""
        return linear_site(self.site_name, self, self.frozen_weight(), self._row_sq)

    def disk_keys(self, name: str, path: str) -> dict[str, str]:
        """For each parameter of adapter ``name``, its key in PEFT's file; ``path`` is this layer's in the model."""
        return {
            key: f"base_model.model.{path}.{end}" for key, end in self._method(name).disk_names(self.site()).items()
        }

    def frozen_weight(self) -> FrozenWeight:
        """The layer's weight as W (o, i)."""
        return frozen_weight(self)

    def _method(self, name: str) -> LinearMethod:
        return cast(LinearMethod, self.adapter_state.configs[name])

    def _dropped(self, x: Tensor, name: str) -> Tensor | None:
        p = self._method(name).dropout
        return nn.functional.dropout(x, p, training=True) if p else None

    def _sum_in_training(self, x: Tensor, site: LinearSite, names: list[str]) -> Tensor:
        """Several active adapters, each with a dropout mask of its own in front of its A."""
        records = [self.record(name, site) for name in names]
        whole = compose_linear(records, site.bias)  # raises where they cannot act together
        y = apply_linear(without_lowrank(whole), x, self.frozen_weight(), site.bias)
        for name, record in zip(names, records, strict=True):
            if record.a is not None and record.b is not None:
                dropped = self._dropped(x, name)
                part = lowrank(x if dropped is None else dropped, record.a, record.b)
                y = y + (part * record.scale).to(y.dtype)
        return y

    def _row_sq(self) -> Tensor:
        weight = self.frozen_weight()
        key = (weight.shape, next(self.buffers(), next(self.parameters())).device)
        cached = getattr(self, "_row_sq_cache", None)
        if cached is None or cached[0] != key:
            cached = (key, weight.dense(torch.float32).square().sum(dim=1))
            self._row_sq_cache = cached
        return cast(Tensor, cached[1])


def _parameters(holder: nn.Module) -> dict[str, Tensor]:
    return dict(holder.named_parameters())


def is_linear(module: nn.Module) -> bool:
    """Whether a method for linear layers can adapt this module."""
    return isinstance(module, (nn.Linear, Conv1D)) or hasattr(module, "frozen_format")


def frozen_weight(module: nn.Module) -> FrozenWeight:
    """The weight of a linear layer as W (o, i), whatever its class."""
    stored = getattr(module, "frozen_format", None)
    if stored is not None:
        return cast(FrozenWeight, stored())
    weight = cast(Tensor, module.weight)
    return DenseWeight(weight.T if isinstance(module, Conv1D) else weight)


def linear_site(name: str, module: nn.Module, weight: FrozenWeight, row_sq: Any = None) -> LinearSite:
    """A linear layer described."""
    bias = cast("Tensor | None", module.bias)
    o, i = weight.shape
    return LinearSite(
        name=name, in_features=i, out_features=o, has_bias=bias is not None, weight=weight, bias=bias, row_sq=row_sq
    )


def adapt_linear(name: str, module: nn.Module, state: AdapterState) -> AdaptedLinear:
    """Make a linear layer adapted, in place; nothing changes until an adapter is added and active."""
    change_class(module, AdaptedLinear)
    adapted = cast(AdaptedLinear, module)
    adapted.site_name, adapted.adapter_state = name, state
    adapted.adapters = nn.ModuleDict()
    return adapted


def restore_linear(module: AdaptedLinear) -> None:
    """Take every adapter off a layer and give it back its class."""
    del module.adapters, module.adapter_state, module.site_name
    module.__dict__.pop("_row_sq_cache", None)
    restore_class(module)
