"""Convolutions with adapters, in place: a kernel is the linear layer (o, channels · window) applied to patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from veneer.errors import CompositionError
from veneer.model.adapted.linear import AdaptedSite
from veneer.model.cut_weight import read_whole, whole
from veneer.model.inplace import InPlace, base_of
from veneer.quant.dense import DenseWeight
from veneer.records.channel_groups import block_diagonal, column_blocks
from veneer.records.deltas import Around
from veneer.records.frozen import FrozenWeight
from veneer.records.linear import apply_projected, compose_linear, fold_linear
from veneer.records.sites import LinearSite
from veneer.records.terms.change import Change
from veneer.records.terms.in_groups import InGroups
from veneer.records.terms.pair import Pair
from veneer.records.terms.rotation import Rotation
from veneer.records.terms.scale import Scale

_CONVOLUTIONS = {nn.Conv1d: nn.functional.conv1d, nn.Conv2d: nn.functional.conv2d, nn.Conv3d: nn.functional.conv3d}


class AdaptedConvolution(AdaptedSite):
    """Mixin in front of a convolution's class, for low-rank updates B A and others.

    A is a convolution with the layer's window and stride and r output channels. It reads all channels, even if the
    layer divides its channels into groups. B is a matrix (o, r) applied at each position.
    """

    def forward(self, x: Tensor) -> Tensor:
        routing = self.adapter_state.routed()
        held = [] if routing is None else [name for name in routing.adapters if self.holds(name)]
        if routing is not None and held:
            return self.by_rows(routing, held, (x,), {})
        names = self.acting_here()
        if not names:
            return cast(Tensor, super().forward(x))
        site = self.site()
        records = [self.record_now(name, None, site) for name in names]
        whole = compose_linear(records, site.bias)
        base = self._product(x, cast(Tensor, self.effective("weight")).flatten(1), whole.input)
        products = []
        for name, record in zip(names, records, strict=True):
            dropped = self.dropped(x, name)
            source = x if dropped is None else dropped
            products += [self._added(source, term, whole.input) for term in record.adds]
        return apply_projected(whole, products, base, site.bias).movedim(-1, self._channels)

    def _added(self, x: Tensor, term: Pair | Change, entry: Around | None) -> Tensor:
        """Return an adapter's update of the weight times every patch of x. ``entry`` is a map of the input that is
        applied to the patches first.
        """
        if isinstance(term, Pair):
            return term.behind_a(self._product(x.to(term.a.dtype), term.a, entry))
        matrix = term.blocks(term.dtype) if isinstance(term, InGroups) else term.dense(term.dtype)
        return self._product(x.to(term.dtype), matrix, entry)

    def site(self, names: Sequence[str] | None = None) -> LinearSite:
        weight, bias = cast(Tensor, self.effective("weight", names)), self.effective("bias", names)
        shape = shape_of_convolution(self.site_name, self)
        own = _as_matrix(weight, shape.groups)
        matrix = read_whole(own, weight, lambda: _as_matrix(whole(weight), shape.groups))
        return replace(shape, weight=matrix, bias=bias, row_sq=self._row_sq)

    def folded_weight(self, names: Sequence[str], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        site = self.site(names)
        if site.groups == 1:
            return super().folded_weight(names, dtype)
        present = [name for name in names if name in self.adapters]
        record = self.composed(present, site)
        rotates = any(isinstance(term, Rotation) for term in (record.input, record.output))
        if rotates or not all(isinstance(term, InGroups) for term in record.adds):
            raise CompositionError(
                f"adapter {present[0]!r} mixes channels of different groups of {self.site_name}: the kernel of a "
                f"convolution in {site.groups} groups cannot hold such an update. Keep the adapter unmerged."
            )
        kernel = cast(Tensor, self.effective("weight", names)).flatten(1)
        wide = kernel.to(torch.promote_types(kernel.dtype, torch.float32))
        wide = sum((cast(InGroups, term).blocks(wide.dtype) for term in record.adds), wide)
        if record.input_scale is not None:
            wide = wide * column_blocks(record.input_scale, len(wide), site.groups)
        folded, bias = fold_linear(replace(record, adds=(), input=None), wide, site.bias, dtype)
        return folded, None if record.bias is None else bias

    def stored(self, weight: Tensor) -> Tensor:
        return weight.reshape(self._kernel_shape)

    @property
    def _kernel_shape(self) -> tuple[int, ...]:
        return tuple(cast(Tensor, self._parameters["weight"]).shape)

    @property
    def _channels(self) -> int:
        """Return the index of the channels' dimension. It is counted from the end, because the batch dimension may be
        missing.
        """
        return 1 - len(self._kernel_shape)

    def _product(self, x: Tensor, matrix: Tensor, entry: Around | None) -> Tensor:
        """Return the product of a matrix with every patch of x that the layer's window visits: (…, n).

        The matrix is (n, channels · window), or (n, channels / groups · window) for a convolution in groups. If
        ``entry`` is given, this map of the input is applied to the patches first.
        """
        window, groups = self._kernel_shape[2:], cast(Any, self).groups
        channels = matrix.shape[1] // math.prod(window)
        in_groups = groups if channels == self._kernel_shape[1] else 1
        if entry is not None:
            matrix = self._behind(entry, matrix, in_groups)
        kernel = matrix.reshape(-1, channels, *window)
        own = groups == in_groups
        y = cast(Any, self)._conv_forward(x, kernel, None) if own else _without_groups(self, x, kernel)
        return cast(Tensor, y).movedim(self._channels, -1)

    def _behind(self, entry: Around, matrix: Tensor, groups: int) -> Tensor:
        """Return ``matrix`` times the input map ``entry``, in the dtype of ``matrix``. One product with the patches
        then applies both. Raises CompositionError if ``entry`` is not a scale and the convolution has groups.
        """
        wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        if groups == 1:
            return entry.fold_input(wide).to(matrix.dtype)
        if not isinstance(entry, Scale):
            raise CompositionError(
                f"{self.site_name} is a convolution in {groups} groups of channels, which an adapter that rotates its "
                "inputs cannot change: list it in exclude_modules"
            )
        return (wide * column_blocks(entry.vector, len(matrix), groups)).to(matrix.dtype)


@dataclass(frozen=True, slots=True)
class BlockDiagonalWeight:
    """Kernel of a convolution in groups as the matrix (o, channels · window), which is mostly zeros.

    The full matrix is computed only when it is read.
    """

    blocks: Float[Tensor, "o k"]
    groups: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.blocks.shape[0], self.blocks.shape[1] * self.groups

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes

    def matmul(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        return DenseWeight(self.dense()).matmul(x)

    def matmul_t(self, dy: Float[Tensor, "*batch o"]) -> Float[Tensor, "*batch i"]:
        return DenseWeight(self.dense()).matmul_t(dy)

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "o i"]:
        return block_diagonal(self.blocks if dtype is None else self.blocks.to(dtype), self.groups)


def is_convolution(module: nn.Module) -> bool:
    """Return True if a module is a torch convolution whose class has torch's own forward.

    A class that overrides forward (to standardize the kernel, say) is excluded, because its output is no product with
    the stored kernel.
    """
    own = base_of(type(module)) if isinstance(module, InPlace) else type(module)
    plain = any(issubclass(own, cls) and own.forward is cls.forward for cls in _CONVOLUTIONS)
    return plain and module._parameters.get("weight") is not None


def shape_of_convolution(path: str, module: nn.Module) -> LinearSite:
    """Describe a convolution as a linear layer: its name, shape, window and groups, without its weight."""
    conv = cast(nn.Conv2d, module)
    return LinearSite(
        name=path,
        in_features=conv.in_channels * math.prod(conv.kernel_size),
        out_features=conv.out_channels,
        kind="convolution",
        window=tuple(conv.kernel_size),
        groups=conv.groups,
    )


def weight_of_convolution(module: nn.Module) -> FrozenWeight:
    """Return the kernel as the matrix (o, channels · window)."""
    return _as_matrix(cast(Tensor, module._parameters["weight"]), cast(Any, module).groups)


def _as_matrix(weight: Tensor, groups: int) -> FrozenWeight:
    kernel = weight.flatten(1)
    return DenseWeight(kernel) if groups == 1 else BlockDiagonalWeight(kernel, groups)


def _without_groups(module: nn.Module, x: Tensor, kernel: Tensor) -> Tensor:
    """Run the layer's convolution, without groups, with a kernel for all channels."""
    conv = cast(Any, module)
    convolve = next(function for cls, function in _CONVOLUTIONS.items() if isinstance(module, cls))
    padding = conv.padding
    if conv.padding_mode != "zeros":
        x, padding = nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
    return convolve(x, kernel, None, conv.stride, padding, conv.dilation)
