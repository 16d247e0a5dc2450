"""Linear layers with adapters. A layer becomes adapted in place: its class changes, the module and its weight stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.contract import LinearMethod
from veneer.contract.keys import parameter_key
from veneer.core.frozen import FrozenWeight
from veneer.core.linear import apply_linear, apply_linear_sum, compose_linear, fold_linear, row_blocks
from veneer.core.records import LinearDelta
from veneer.core.rows import apply_linear_rows
from veneer.core.sites import LinearSite
from veneer.core.token_rows import project_rows
from veneer.model.adapted import Adapted, factors_of
from veneer.model.grouped import add_grouped
from veneer.model.routing import Routing
from veneer.quant.dense import DenseWeight


class AdaptedSite(Adapted):
    """An adapted module that is a linear map of some kind: it has a site, and its adapters lower to records."""

    def site(self, names: Sequence[str] | None = None) -> LinearSite:
        """The map described, with its weight and bias as these adapters (by default those acting) see them."""
        raise NotImplementedError

    def record(self, name: str, site: LinearSite | None = None) -> LinearDelta:
        """What adapter ``name`` means here."""
        return self.method(name).lower(site or self.site((name,)), factors_of(self.adapters[name]))

    def method(self, name: str) -> LinearMethod:
        """The config of an adapter."""
        return cast(LinearMethod, self.adapter_state.configs[name])

    def disk_keys(self, name: str, path: str) -> dict[str, str]:
        """For each parameter of adapter ``name``, its key in PEFT's file; ``path`` is this layer's in the model."""
        ends = self.method(name).disk_names(self.site((name,)))
        return {key: parameter_key(self.disk_path(name, path), end) for key, end in ends.items()}

    def packed(self, name: str, path: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is written of adapter ``name``, by its keys on disk, given its tensors by theirs (`disk_keys`)."""
        method, site, keys = self.method(name), self.site((name,)), self.disk_keys(name, path)
        ends = method.packed().disk_names(site)
        packed = method.packing.pack({own: values[key] for own, key in keys.items()})
        return {parameter_key(self.disk_path(name, path), ends[own]): value for own, value in packed.items()}

    def unpacked(self, name: str, path: str, written: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `packed`."""
        method, site, keys = self.method(name), self.site((name,)), self.disk_keys(name, path)
        ends = method.packed().disk_names(site)
        packed = {own: written[parameter_key(self.disk_path(name, path), end)] for own, end in ends.items()}
        return {keys[own]: value for own, value in method.packing.unpack(packed).items()}

    def own_weight(self) -> Tensor | None:
        """The module's own parameter that the map is, if it is one."""
        return self._parameters.get("weight")

    def parameter_dtype(self, widen: bool) -> torch.dtype:
        """The dtype of an adapter's parameters: at least float32 if ``widen``, otherwise the base's."""
        own = self.own_weight()
        if own is None or not own.is_floating_point():  # codes: the format knows what it computes in
            return torch.float32 if widen else cast(FrozenWeight, self.site().weight).dense().dtype
        return torch.promote_types(own.dtype, torch.float32) if widen else own.dtype

    def acting_here(self) -> list[str]:
        """The adapters that change this layer's forward pass now."""
        return [name for name in self.adapter_state.acting() if name in self.adapters]

    def composed(self, names: Sequence[str], site: LinearSite) -> LinearDelta:
        """One record for several adapters. Raises CompositionError where there is none."""
        return compose_linear([self.record(name, site) for name in names], site.bias)

    def dropped(self, x: Tensor, name: str) -> Tensor | None:
        """The input of A under this adapter's dropout; None where nothing is dropped."""
        p = self.method(name).dropout if self.training else 0.0
        return nn.functional.dropout(x, p, training=True) if p else None

    def folded(self, names: Sequence[str]) -> dict[str, Tensor]:
        values = super().folded(names)
        present = [name for name in names if name in self.adapters]
        if present:
            folded, bias = self.folded_weight(names, self.folded_dtype(names))
            values["weight"] = self.stored(folded)
            if bias is not None:
                values["bias"] = bias.to(values["weight"].dtype)
        return values

    def folded_dtype(self, names: Sequence[str]) -> torch.dtype:
        """The dtype that a folded weight is kept in: the layer's own, or that which its codes stand for."""
        own = self.own_weight()
        if own is not None and own.is_floating_point():
            return own.dtype
        return cast(FrozenWeight, self.site(names).weight).dense().dtype

    def folded_weight(self, names: Sequence[str], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """W (o, i) with these adapters folded in, rounded once to ``dtype``, and the bias where they change it."""
        site = self.site(names)
        present = [name for name in names if name in self.adapters]
        delta = self.composed(present, site)
        folded, bias = fold_linear(delta, unrounded(cast(FrozenWeight, site.weight)), site.bias, dtype)
        return folded, None if delta.bias is None else bias

    def stored(self, weight: Tensor) -> Tensor:
        """A matrix W (o, i) in the layout of the module's own parameter."""
        return weight

    def _row_sq(self) -> Tensor:
        """Squared row norms of the weight, computed once. `forget` drops them where the weight changes."""
        cached = self.__dict__.get("_row_sq_cache")
        if cached is None or "weight" in type(self).swapped:
            weight = cast(FrozenWeight, self.site(self.adapter_state.acting()).weight)
            cached = self.__dict__["_row_sq_cache"] = row_squares(unrounded(weight))
        return cast(Tensor, cached)

    def forget(self) -> None:
        """Drop what was computed from the weight."""
        self.__dict__.pop("_row_sq_cache", None)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.forget()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)


class AdaptedLinear(AdaptedSite):
    """Mixed in front of a linear layer's class: torch's Linear, GPT-2's Conv1D, or one with a ``frozen_format``."""

    def forward(self, x: Tensor) -> Tensor:
        routing = self.adapter_state.routed()
        if routing is not None:
            return self._mixed(x, routing)
        names = self.acting_here()
        if not names:
            return self._own(x)
        site = self.site()
        weight = cast(FrozenWeight, site.weight)
        if len(names) > 1 and self.training:  # each has a dropout mask of its own
            records = [self.record(name, site) for name in names]
            return apply_linear_sum(records, x, weight, site.bias, [self.dropped(x, name) for name in names])
        delta = self.composed(names, site)
        return apply_linear(delta, x, weight, site.bias, self.dropped(x, names[0]))

    def site(self, names: Sequence[str] | None = None) -> LinearSite:
        weight = self._weight(names)
        bias = self.effective("bias", names)
        o, i = weight.shape
        return LinearSite(
            name=self.site_name,
            in_features=i,
            out_features=o,
            weight=weight,
            bias=bias,
            row_sq=self._row_sq,
        )

    def frozen_weight(self) -> FrozenWeight:
        """The layer's weight as W (o, i)."""
        return self._weight(None)

    def stored(self, weight: Tensor) -> Tensor:
        return weight.T.contiguous() if isinstance(self, Conv1D) else weight

    def replace(self, values: dict[str, Tensor]) -> None:
        # a quantized layer has no parameter to put a dense weight into: it is kept beside the codes
        if self.has_codes and "weight" in values:
            self.__dict__["merged_weight"] = values["weight"]
            values = {key: value for key, value in values.items() if key != "weight"}
        super().replace(values)

    def put_back(self) -> None:
        self.__dict__.pop("merged_weight", None)
        super().put_back()

    @property
    def has_codes(self) -> bool:
        """Whether the layer's weight is kept in a quantized format."""
        return hasattr(self, "frozen_format")

    def _weight(self, names: Sequence[str] | None) -> FrozenWeight:
        if hasattr(self, "frozen_format"):
            return frozen_weight(self)
        weight = cast(Tensor, self.effective("weight", names))
        return DenseWeight(weight.T if isinstance(self, Conv1D) else weight)

    def _own(self, x: Tensor) -> Tensor:
        """What the layer computes by itself: the base's product, or, merged into a quantized base, a dense one."""
        merged = cast("Tensor | None", self.__dict__.get("merged_weight"))
        if merged is not None:
            return apply_linear(LinearDelta(), x, DenseWeight(merged), self.effective("bias"))
        acting = self.adapter_state.acting()
        rows = self.token_rows(acting)
        if not rows:
            return cast(Tensor, super().forward(x))
        bias = self.effective("bias")
        y = apply_linear(LinearDelta(), x, DenseWeight(cast(Tensor, self.whole("weight", acting))), bias)
        for each in rows:
            y = project_rows(x, y, each.index(x.device), each.trainable_tokens_delta, bias)
        return y

    def _mixed(self, x: Tensor, routing: Routing) -> Tensor:
        """A mixed batch: one pass over the weight for all rows, unless rows have whole weights of their own."""
        names = [name for name in routing.adapters if self.holds(name)]
        if any(self.has_own(name, "weight") for name in names):
            return self.by_rows(routing, names, (x,), {})
        if not names:
            return self._own(x)
        deltas = [LinearDelta(), *(self._record_with_bias(name) for name in names)]
        index = routing.index(x.shape[0], names, self.site_name)
        weight = cast(FrozenWeight, self.site(()).weight)
        dropped = self._dropped_rows(x, names, index, routing)
        bias = self._parameters.get("bias")
        return apply_linear_rows(deltas, index, x, weight, bias, lowrank_input=dropped, add=add_grouped)

    def _record_with_bias(self, name: str) -> LinearDelta:
        """The record of one adapter; a bias that it trains is in it."""
        site = self.site((name,))
        record = self.record(name, site) if name in self.adapters else LinearDelta()
        return replace(record, bias=site.bias) if name in self.copies and record.bias is None else record

    def _dropped_rows(self, x: Tensor, names: Sequence[str], index: Tensor, routing: Routing) -> Tensor | None:
        """The input of each row's A under its adapter's dropout; None where nothing is dropped."""
        rates = {n: self.method(n).dropout for n in names if self.training and n in self.adapters}
        if not any(rates.values()):
            return None
        dropped = x
        for place, name in enumerate(names, start=1):
            if rates.get(name):
                rows = (index == place).nonzero().squeeze(1).to(x.device)
                dropped = dropped.index_copy(0, rows, routing.dropout(name, x[rows], rates[name]))
        return dropped


def wide(weight: FrozenWeight) -> Tensor:
    """The weight as a matrix in at least float32."""
    return weight.dense(torch.promote_types(weight.dense().dtype, torch.float32))


def unrounded(weight: FrozenWeight) -> Tensor:
    """The weight as a matrix that has lost nothing: as it is where it is dense, in at least float32 from codes."""
    return weight.dense() if isinstance(weight, DenseWeight) else wide(weight)


def row_squares(matrix: Tensor) -> Tensor:
    """Squared norms of the rows, in at least float32, without a copy of the matrix."""
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    return torch.cat([matrix[rows].to(dtype).square().sum(dim=1) for rows in row_blocks(matrix)])


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
