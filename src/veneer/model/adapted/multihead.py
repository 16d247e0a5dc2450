"""Adapters on `nn.MultiheadAttention`, in place.

Its joined input projection and its output projection are linear maps. torch's own code reads their weights without
calling any layer's forward. The weight that it reads is therefore the one with the update folded in. A has no input of
its own on which dropout could act.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from veneer.contract.keys import OUT_PROJECTION, attention_path
from veneer.contract.places import REPEATS
from veneer.errors import CompositionError
from veneer.model.adapted.linear import AdaptedLinear, AdaptedSite
from veneer.model.adapted.site import Adapted, adapt, swap_reading
from veneer.model.adapted.state import AdapterState
from veneer.quant.dense import DenseWeight
from veneer.records.deltas import LinearDelta
from veneer.records.linear import fold_linear
from veneer.records.sites import LinearSite


class _Folding(AdaptedSite):
    """Linear map whose weight and bias torch's attention reads as parameters, without calling the map. A read returns
    the parameter with the adapters' updates added.
    """

    weight_name: str
    bias_name: str

    def effective(self, parameter: str, names: Sequence[str] | None = None) -> Tensor | None:
        if names is not None or parameter not in (self.weight_name, self.bias_name):
            return Adapted.effective(self, parameter, names)
        self.require_one_for_all_rows()
        read = {} if self.kept.read is None else self.kept.read
        if not read:
            weight, bias = (cast(Tensor, self.own(name, None)) for name in (self.weight_name, self.bias_name))
            acting = self.acting_here()
            record = self.composed(acting, self.site()) if acting else LinearDelta()
            folded = fold_linear(record, weight, bias) if acting else (weight, bias)
            read |= dict(zip((self.weight_name, self.bias_name), folded, strict=True))
        return read[parameter]

    def own(self, parameter: str, names: Sequence[str] | None) -> Tensor | None:
        """Return a parameter without the low-rank and other updates of adapters. If one of the adapters ``names``
        (None: the active ones) has trained a copy of the parameter, the copy is returned.
        """
        return Adapted.effective(self, parameter, self.adapter_state.acting() if names is None else names)

    def require_one_for_all_rows(self) -> None:
        """Raise CompositionError if the rows of a batch name their adapters, and one of these changes this map."""
        routing = self.adapter_state.routed()
        if routing is not None and any(name in self.adapters for name in routing.adapters):
            raise CompositionError(
                f"{self.site_name} is read as one weight for all rows: rows of one batch cannot take different "
                "adapters there. Run the adapters one after another."
            )


class AdaptedAttention(_Folding):
    """Mixin before `nn.MultiheadAttention`: it adapts the map from the input to queries, keys and
    values, W (3 d, d).
    """

    weight_name, bias_name = "in_proj_weight", "in_proj_bias"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.require_one_for_all_rows()
        out_projection = cast(Any, self).out_proj
        inner = out_projection.kept.reading() if isinstance(out_projection, AdaptedOutProjection) else nullcontext()
        with self.kept.reading(), inner:
            return Adapted.forward(self, *args, **kwargs)

    def site(self, names: Sequence[str] | None = None) -> LinearSite:
        weight = cast(Tensor, self.own(self.weight_name, names))
        bias = self.own(self.bias_name, names)
        return LinearSite(
            name=self.site_name,
            in_features=weight.shape[1],
            out_features=weight.shape[0],
            weight=DenseWeight(weight),
            bias=bias,
            row_sq=self._row_sq,
        )

    def folded(self, names: Sequence[str]) -> dict[str, Tensor]:
        places = {"weight": self.weight_name, "bias": self.bias_name}
        return {places.get(key, key): value for key, value in super().folded(names).items()}

    def own_weight(self) -> Tensor | None:
        return self._parameters[self.weight_name]


class AdaptedOutProjection(_Folding, AdaptedLinear):
    """Mixin before the output projection of torch's attention, which reads its weight but never calls it.

    An adapter that targets the whole attention also changes this layer, under the attention's path in its settings and
    on disk. Its update here is added twice, because PEFT's forward pass and merging both do so, and PEFT's files should
    have the same effect here. (The gradient is that of adding once.)
    """

    takes_rows = False
    weight_name, bias_name = "weight", "bias"

    def site(self, names: Sequence[str] | None = None) -> LinearSite:
        names = self.adapter_state.acting() if names is None else names
        site = super().site(names)
        return self._as_seen_by(names[0], site) if len(names) == 1 else site

    def record(self, name: str, site: LinearSite | None = None, **how: Any) -> LinearDelta:
        return super().record(name, self._as_seen_by(name, site or self.site((name,))), **how)

    def disk_path(self, name: str, path: str) -> str:
        return attention_path(path) if self._by_attention(name) else path

    def _weight(self, names: Sequence[str] | None) -> DenseWeight:
        return DenseWeight(cast(Tensor, self.own("weight", names)))

    def _by_attention(self, name: str) -> bool:
        attention = self.kept.attention
        return isinstance(attention, AdaptedAttention) and name in attention.adapters

    def _as_seen_by(self, name: str, site: LinearSite) -> LinearSite:
        if not self._by_attention(name):
            return replace(site, name=self.site_name, repeats=1)
        return replace(site, name=self.site_name.removesuffix(f".{OUT_PROJECTION}"), repeats=REPEATS)


def adapt_attention(path: str, module: nn.Module, state: AdapterState) -> Adapted:
    """Adapt an attention and its output projection in place."""
    adapted = adapt(path, module, state, AdaptedAttention)
    projection = adapt_out_projection(f"{path}.{OUT_PROJECTION}", cast(Any, module).out_proj, state)
    projection.kept.attention = adapted
    for parameter in (AdaptedAttention.weight_name, AdaptedAttention.bias_name):
        swap_reading(adapted, parameter)
    return adapted


def adapt_out_projection(path: str, module: nn.Module, state: AdapterState) -> Adapted:
    """Adapt the output projection of an attention in place."""
    adapted = adapt(path, module, state, AdaptedOutProjection)
    for parameter in (AdaptedOutProjection.weight_name, AdaptedOutProjection.bias_name):
        swap_reading(adapted, parameter)
    return adapted


def is_attention(module: nn.Module) -> bool:
    """Return True if a module is torch's attention with one matrix for queries, keys and values."""
    return isinstance(module, nn.MultiheadAttention) and module._parameters.get("in_proj_weight") is not None


def is_out_projection(module: nn.Module) -> bool:
    """Return True if a module is the output projection of `nn.MultiheadAttention`."""
    return isinstance(module, NonDynamicallyQuantizableLinear)


def shape_of_attention(path: str, module: nn.Module) -> LinearSite:
    """Describe an attention's joined input projection as a linear layer, by its name and shape, without its weight."""
    d = cast(nn.MultiheadAttention, module).embed_dim
    return LinearSite(name=path, in_features=d, out_features=3 * d)


def weight_of_attention(module: nn.Module) -> DenseWeight:
    """Return the joined input projection's matrix (3 d, d)."""
    return DenseWeight(cast(Tensor, module._parameters["in_proj_weight"]))
