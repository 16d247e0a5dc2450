"""Linear layers with adapters. A layer becomes adapted in place: its class changes, the module and its weight stay."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.contract import LinearMethod, Params
from veneer.model.adapted.allocation import Allocation
from veneer.model.adapted.lowered import lowered
from veneer.model.adapted.masks import masks_of
from veneer.model.adapted.site import Adapted, TiedFactors, factors_of
from veneer.model.cut_weight import read_whole, whole
from veneer.model.inplace import plain_class
from veneer.model.linear_class import computes_linear
from veneer.model.quantized.frozen_weight import frozen_weight
from veneer.model.quantized.module import CodedModule
from veneer.ops.dropout import Mask, dropout
from veneer.ops.grouped_low_rank import AdapterRuns
from veneer.ops.linear.layer import LinearLayer
from veneer.ops.linear.op import linear
from veneer.plain.autocast import without_autocast
from veneer.quant.dense import DenseWeight
from veneer.quant.product import CodedWeight
from veneer.records.deltas import LinearDelta
from veneer.records.frozen import FrozenWeight
from veneer.records.linear import (
    apply_linear,
    apply_linear_sum,
    compose_linear,
    entered,
    fold_blocks,
    fold_linear,
    row_blocks,
)
from veneer.records.sequences import MEMBERS, Sequences, members_of_rows
from veneer.records.sites import LinearSite
from veneer.records.token_rows import project_rows


class AdaptedSite(Adapted):
    """Adapted module that computes a linear map (its *site*). An adapter's change of the map is a record."""

    takes_rows: ClassVar[bool] = False  # whether a forward pass calls it on rows, which the map multiplies

    def site(self, names: Sequence[str] | None = None) -> LinearSite:
        """Describe the module's linear map, with its weight and bias under these adapters, by default
        the active ones.
        """
        raise NotImplementedError

    def record(
        self,
        name: str,
        site: LinearSite | None = None,
        *,
        task: int | None = None,
        given: Params = MappingProxyType({}),
    ) -> LinearDelta:
        """Return the record (the change as tensors) of adapter ``name`` at this layer. It is the same with and without
        autocast.

        ``task``: the task to use if the adapter has several; by default the one chosen in the model's adapter state.
        ``given``: see `of_pass`.
        """
        site, params, method = site or self.site((name,)), factors_of(self.adapters[name]), self.method(name)
        task = self.adapter_state.tasks.get(name) if task is None else task
        if task is not None:
            params = dict(method.of_task(params, task))
        with without_autocast(next((x.device for x in params.values()), None) or device_of(self)):
            return method.lower(site, {**params, **given} if given else params)

    def of_pass(self, name: str, site: LinearSite, shape: Sequence[int] | None) -> Params:
        """Return the tensors that a record needs in the current forward pass, besides the adapter's parameters.

        These are new random numbers for each pass in training, and the index of the sequence of each token. ``shape``
        (…, n) is that of this layer's input; None means the shape of the model's input.
        """
        method, state = self.method(name), self.adapter_state
        found: dict[str, Tensor] = {}  # torch.compile calls no dict[str, Tensor]
        if self.training and state.drops:
            routing = state.routed()
            found |= method.drawn(site, None if routing is None else routing.generators.get(name))
        if method.by_sequence and (state.sequences is not None or shape is not None):
            found[MEMBERS] = self._members(state.sequences, shape)
        return {key: value.to(device_of(self)) for key, value in found.items()}

    def _members(self, known: Sequences | None, shape: Sequence[int] | None) -> Tensor:
        """Return, for each row of an input, the index of its sequence. If the sequences are not known, each row counts
        as a sequence.
        """
        if known is not None and shape is None:
            return known.members
        rows = tuple(shape or ())
        found = None if known is None else known.at(rows)
        return members_of_rows(rows, device_of(self)) if found is None else found

    def record_now(
        self, name: str, shape: Sequence[int] | None, site: LinearSite | None = None, task: int | None = None
    ) -> LinearDelta:
        """Return `record` for the current forward pass, with the random numbers and sequences of `of_pass`. ``shape``
        is that of the layer's input.
        """
        site = site or self.site((name,))
        return self.record(name, site, task=task, given=self.of_pass(name, site, shape))

    def method(self, name: str) -> LinearMethod:
        """Return the config of an adapter."""
        return cast(LinearMethod, self.adapter_state.configs[name])

    def add_adapter(
        self, name: str, allocation: Allocation, keys: Mapping[str, str], start: Params | None = None
    ) -> None:
        """Give a new adapter its parameters in this layer. ``keys`` are their keys on disk. ``start``: see
        `Allocation.parameters`.
        """
        method, site = self.method(name), self.site((name,))
        dtype, device = self.parameter_dtype(allocation.widen), device_of(self)
        held = allocation.parameters(method, site, device, dtype, start)
        fixed = [key for key in method.packing.fixed if key in held]
        for key in fixed:  # a buffer: it moves and is saved with the adapter, and no optimizer sees it
            held.register_buffer(key, held.pop(key).detach())
        self.hold(name, held, keys)

    def derive(self, name: str) -> None:
        if not self.method(name).reads_weight:
            return
        held, site = self.adapters[name], self.site((name,))
        with torch.no_grad(), without_autocast(device_of(self)):
            found = self.method(name).derived(site, factors_of(held))
        for key, value in found.items():
            held.register_buffer(key, value.to(device_of(self)), persistent=False)
        if found and self.kept.on_load is None:
            hook = self.register_load_state_dict_post_hook(_derive_again)  # type: ignore[no-untyped-call]
            self.kept.on_load = hook

    def owns(self, name: str) -> bool:
        return name in self.adapters and not isinstance(self.adapters[name], TiedFactors)

    def is_update(self, name: str) -> bool:
        return name not in self.copies

    def packed(self, name: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        keys = self.disk_keys(name)
        packed = self.method(name).packing.pack({own: values[key] for own, key in keys.items()})
        return {keys[own]: value for own, value in packed.items()}

    def unpacked(self, name: str, written: Mapping[str, Tensor]) -> dict[str, Tensor]:
        keys = self.disk_keys(name)
        packed = {own: written[key] for own, key in keys.items() if key in written}
        return {keys[own]: value for own, value in self.method(name).packing.unpack(packed).items()}

    def value_problems(self, name: str, written: Mapping[str, Tensor]) -> list[str]:
        packed = {own: written[key] for own, key in self.disk_keys(name).items() if key in written}
        return self.method(name).packing.problems(self.site((name,)), packed)

    def own_weight(self) -> Tensor | None:
        """Return the module's own parameter that holds the linear map's weight, or None if there is none."""
        return self._parameters.get("weight")

    def parameter_dtype(self, widen: bool) -> torch.dtype:
        """Return the dtype of an adapter's parameters: at least float32 if ``widen``, otherwise the base's."""
        own = self.own_weight()
        if own is None or self.has_codes:  # the format knows what it computes in
            return torch.float32 if widen else cast(FrozenWeight, self.site().weight).dense().dtype
        return torch.promote_types(own.dtype, torch.float32) if widen else own.dtype

    def acting_here(self) -> list[str]:
        """Return the adapters that now change this layer's forward pass."""
        return [name for name in self.adapter_state.acting() if name in self.adapters]

    def composed(self, names: Sequence[str], site: LinearSite) -> LinearDelta:
        """Compose several adapters' changes into one record. Raises CompositionError if that is impossible."""
        return compose_linear([self.record(name, site) for name in names], site.bias)

    def rate(self, name: str) -> float:
        """Return the current dropout rate of this adapter's input."""
        return self.method(name).dropout if self.training and self.adapter_state.drops else 0.0

    def dropped(self, x: Tensor, name: str) -> Tensor | None:
        """Return the input x of the low-rank factor A after this adapter's dropout, or None if nothing is dropped."""
        masks = masks_of([self.rate(name)], x.shape, x.device, None)
        return dropout(x, cast(Mask, masks[0])) if masks else None

    def folded(self, names: Sequence[str]) -> dict[str, Tensor]:
        values = super().folded(names)
        present = [name for name in names if name in self.adapters]
        if present:
            folded, bias = self.folded_weight(names, self.folded_dtype(names))
            values["weight"] = self.stored(folded)
            if bias is not None:
                values["bias"] = bias.to(values["weight"].dtype)
        return values

    def folded_rows(
        self, key: str, names: Sequence[str], own: Iterable[Tensor], dtype: torch.dtype
    ) -> Iterator[Tensor] | None:
        weight = self._parameters.get("weight")
        dense = weight is not None and weight.ndim == 2 and weight.is_floating_point()
        if not dense or key not in ("weight", "bias") or any(self.has_own(name, "weight") for name in names):
            return None
        present, site = [name for name in names if name in self.adapters], self.site(names)
        delta = self.composed(present, site) if present else LinearDelta()
        if key == "bias":
            bias = site.bias if delta.bias is None else delta.bias
            return None if bias is None else iter((bias.detach().to(dtype),))
        return fold_blocks(delta.transposed() if self.is_turned else delta, own, dtype)

    @property
    def is_turned(self) -> bool:
        """Return True if the module's own parameter is the transpose of the map's W (o, i)."""
        return False

    def folded_dtype(self, names: Sequence[str]) -> torch.dtype:
        """Return the dtype of a weight with adapters merged in: the layer's, or that of its dequantized codes."""
        own = self.own_weight()
        if own is not None and own.is_floating_point():
            return own.dtype
        return cast(FrozenWeight, self.site(names).weight).dense().dtype

    def folded_weight(self, names: Sequence[str], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return W (o, i) with these adapters merged in, rounded once to ``dtype``, and the bias if they change it,
        else None.
        """
        site = self.site(names)
        present = [name for name in names if name in self.adapters]
        delta, weight = self.composed(present, site), unrounded(cast(FrozenWeight, site.weight))
        if self.is_turned:  # the rows of the parameter, so that they come out the same one by one
            return fold_linear(delta.transposed(), weight.T, None, dtype)[0].T, delta.bias
        folded, bias = fold_linear(delta, weight, site.bias, dtype)
        return folded, None if delta.bias is None else bias

    def stored(self, weight: Tensor) -> Tensor:
        """Return a matrix W (o, i) in the layout of the module's own parameter."""
        return weight.T.contiguous() if self.is_turned else weight

    def _row_sq(self) -> Tensor:
        """Return the squared norms of the weight's rows, computed once. `forget` drops them when the weight changes."""
        if self.kept.row_sq is None or "weight" in type(self).swapped:
            weight = cast(FrozenWeight, self.site(self.adapter_state.acting()).weight)
            self.kept.row_sq = row_squares(unrounded(weight))
        return self.kept.row_sq

    def forget(self) -> None:
        self.kept.row_sq = None
        self.kept.found.clear()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.forget()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)


class AdaptedLinear(AdaptedSite):
    """Mixin before a linear layer's class: torch's Linear, GPT-2's Conv1D, or one with a ``frozen_format``."""

    takes_rows: ClassVar[bool] = True

    def forward(self, x: Tensor) -> Tensor:
        routing = self.adapter_state.routed()
        names = self.acting_here() if routing is None else [n for n in routing.adapters if self.holds(n)]
        if not names:
            return self._own(x)
        weight = None if routing is not None and self._differs(names) else self._weight(None)
        if weight is None or torch.compiler.is_compiling() or _trains(weight) or self.drops_apart():
            return self._by_formula(x) if routing is None else self.by_rows(routing, names, (x,), {})
        if routing is not None:
            routing.rows(x.shape[0], self.site_name)
        records, runs = self.acting_records(x.shape[:-1])
        bias, masks = self._parameters.get("bias"), self.masks(x)
        return _computed(x, LinearLayer(weight=weight, bias=bias, records=records, runs=runs, masks=masks))

    def acting_records(self, shape: Sequence[int] | None = None) -> tuple[tuple[LinearDelta, ...], AdapterRuns | None]:
        """Return the records that act now, and the runs of rows that use each, as `LinearLayer` takes them. Without a
        mixed batch, there is at most one record, and no runs (None).

        A bias that an adapter trains is in its record. ``shape``: see `of_pass`. Raises CompositionError for adapters
        whose changes cannot be added.
        """
        routing = self.adapter_state.routed()
        if routing is None:
            record = self._together([name for name in self.adapter_state.acting() if self.holds(name)], shape)
            return (() if record is None else (record,)), None
        records = (self._together([name], shape, task) if self.holds(name) else None for name, task in routing.choices)
        return tuple(LinearDelta() if record is None else record for record in records), routing.runs

    def kept_record(self, name: str, shape: Sequence[int] | None = None, task: int | None = None) -> LinearDelta:
        """Return an adapter's record for a forward pass, from a cache if possible. Only a record that consists of the
        adapter's own tensors is cached.
        """
        lower = functools.partial(self.record_now, name, shape, task=task)
        return lowered(self.adapters[name], self.method(name), lower)

    def _together(
        self, names: Sequence[str], shape: Sequence[int] | None, task: int | None = None
    ) -> LinearDelta | None:
        """Compose the records of these adapters into one, with the bias that they train. Return None if they change
        nothing in this layer.
        """
        held = [name for name in names if name in self.adapters]
        bias = self.effective("bias", names)
        trained = bias if bias is not self._parameters.get("bias") else None
        if not held:
            return None if trained is None else LinearDelta(bias=trained)
        if len(held) == 1:
            record = self.kept_record(held[0], shape, task)
        else:
            site = self.site(names)
            record = compose_linear([self.record_now(name, shape, site) for name in held], site.bias)
        return record if trained is None or record.bias is not None else replace(record, bias=trained)

    def needs_shape(self) -> bool:
        """Return True if a record depends on the sequences of the input and these are not known, so that they must be
        found from the input's shape.
        """
        if self.adapter_state.sequences is not None:
            return False
        return any(self.method(name).by_sequence for name in self.acting_on_rows())

    def replaces_weight(self) -> bool:
        """Return True if all rows, or some, use another weight than the layer's own: a merged one, or an adapter's
        trained copy or rows.
        """
        return self.kept.merged_weight is not None or self._differs(self.adapter_state.acting_on_rows())

    def masks(self, x: Tensor) -> tuple[Mask | None, ...]:
        """Return new dropout masks of x (rows, …, features), one for each of `acting_records`; each call
        draws them again.
        """
        return masks_of(self.rates(), x.shape, x.device, self.adapter_state.routed())

    def rates(self) -> list[float]:
        """Return the dropout rates at the inputs of `acting_records`; none outside training."""
        if not self.training or not self.adapter_state.drops:
            return []
        routing = self.adapter_state.routed()
        names = self.acting_here() if routing is None else [name for name, _ in routing.choices]
        return [self.rate(name) if name in self.adapters else 0.0 for name in names]

    def drops_apart(self) -> bool:
        """Return True if one record combines several adapters of which one has dropout on its own input."""
        names = () if self.adapter_state.routed() is not None else self.acting_here()
        return len(names) > 1 and any(self.rate(name) for name in names)

    def _differs(self, names: Sequence[str]) -> bool:
        """Return True if one of the adapters has a trained copy of the weight, or of some of its rows. The batch rows
        that use this adapter then need another weight than the base's.
        """
        return any(self.has_own(name, "weight") for name in names)

    def _by_formula(self, x: Tensor) -> Tensor:
        """Compute the layer by torch's own operations instead of veneer's op. This is for compilers, which cannot trace
        the op, for a trained base weight, and for several adapters with dropout.
        """
        names, site = self.acting_here(), self.site()
        weight = cast(FrozenWeight, site.weight)
        records = [self.record_now(name, x.shape[:-1], site) for name in names]
        read = entered(compose_linear(records, site.bias), x)
        return apply_linear_sum(records, x, weight, site.bias, [self.dropped(read, name) for name in names])

    def site(self, names: Sequence[str] | None = None) -> LinearSite:
        weight = self._read_whole(self._weight(names))
        bias = self.effective("bias", names)
        o, i = weight.shape
        return LinearSite(
            name=self.site_name,
            in_features=i,
            out_features=o,
            weight=weight,
            bias=bias,
            row_sq=self._row_sq,
            found=self.kept.found,
        )

    def _read_whole(self, weight: FrozenWeight) -> FrozenWeight:
        """Return the weight, gathered if it is sharded over processes."""
        if not isinstance(weight, DenseWeight):
            return read_whole(weight, self.own_weight(), lambda: cast(CodedModule, self).gathered())
        own = weight.tensor
        if self.is_turned:  # gathered as it lies in memory, so that sums have the order of a weight that is not cut
            return read_whole(weight, own, lambda: DenseWeight(whole(own.T).T))
        return read_whole(weight, own, lambda: DenseWeight(whole(own)))

    @property
    def is_turned(self) -> bool:
        return isinstance(self, Conv1D)

    def frozen_weight(self) -> FrozenWeight:
        """Return the layer's weight as W (o, i)."""
        return self._weight(None)

    def replace(self, values: dict[str, Tensor]) -> None:
        # a quantized layer has no parameter to put a dense weight into: it is kept beside the codes
        if self.has_codes and "weight" in values:
            self.kept.merged_weight = values["weight"]
            values = {key: value for key, value in values.items() if key != "weight"}
        super().replace(values)

    def put_back(self) -> None:
        self.kept.merged_weight = None
        super().put_back()

    @property
    def has_codes(self) -> bool:
        return hasattr(self, "frozen_format")

    def _weight(self, names: Sequence[str] | None) -> FrozenWeight:
        if hasattr(self, "frozen_format"):
            return frozen_weight(self)
        weight = cast(Tensor, self.effective("weight", names))
        return DenseWeight(weight.T if isinstance(self, Conv1D) else weight)

    def _own(self, x: Tensor) -> Tensor:
        """Compute the layer without its adapters.

        If they are merged into a quantized base, compute with the dense merged weight.
        """
        if self.kept.merged_weight is not None:
            return apply_linear(LinearDelta(), x, DenseWeight(self.kept.merged_weight), self.effective("bias"))
        acting = self.adapter_state.acting()
        rows = self.token_rows(acting)
        if not rows:
            return cast(Tensor, super().forward(x))
        bias = self.effective("bias")
        y = apply_linear(LinearDelta(), x, DenseWeight(cast(Tensor, self.whole("weight", acting))), bias)
        for each in rows:
            y = project_rows(x, y, each.index(x.device), each.trainable_tokens_delta, bias)
        return y


def _derive_again(layer: nn.Module, keys: object) -> None:
    """Recompute the adapters' tensors that depend on the weight and on other parameters. It is called after a state
    dict has been loaded.
    """
    for name in cast(AdaptedSite, layer).adapters:
        cast(AdaptedSite, layer).derive(name)


def _trains(weight: FrozenWeight) -> bool:
    return isinstance(weight, DenseWeight) and weight.tensor.requires_grad


def _computed(x: Tensor, layer: LinearLayer) -> Tensor:
    """Compute a layer by veneer's op. The output has the dtype of the layer without adapters, or autocast's dtype if
    autocast is on.
    """
    weight, device = layer.weight, x.device.type
    if not torch.is_autocast_enabled(device):
        return linear(x.to(weight.tensor.dtype) if isinstance(weight, DenseWeight) else x, layer)
    dtype = torch.get_autocast_dtype(device)
    if isinstance(weight, DenseWeight | CodedWeight):  # autocast overrules what they compute in
        layer = replace(layer, weight=replace(cast(Any, weight), compute_dtype=dtype))
    with torch.autocast(device, enabled=False):
        return linear(x.to(dtype), layer)


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's first parameter or buffer."""
    return next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def wide(weight: FrozenWeight) -> Tensor:
    """Return the weight as a matrix in at least float32."""
    return weight.dense(torch.promote_types(weight.dense().dtype, torch.float32))


def unrounded(weight: FrozenWeight) -> Tensor:
    """Return the weight as a matrix without rounding: a dense one unchanged, a quantized one in at least float32."""
    return weight.dense() if isinstance(weight, DenseWeight) else wide(weight)


def row_squares(matrix: Tensor) -> Tensor:
    """Return the squared norms of the rows, in at least float32, without a copy of the matrix."""
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    return torch.cat([matrix[rows].to(dtype).square().sum(dim=1) for rows in row_blocks(matrix)])


def is_linear(module: nn.Module) -> bool:
    """Return True if a method for linear layers can adapt this module.

    A subclass with its own forward is tested, because its output may be another function of the weight: some routers
    return several tensors.
    """
    if hasattr(module, "frozen_format"):
        return True
    return isinstance(module, (nn.Linear, Conv1D)) and computes_linear(cast(Hashable, plain_class(type(module))))
