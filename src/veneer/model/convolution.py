"""Convolutions with adapters, in place: a kernel is the linear layer (o, channels · window) applied to patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from veneer.core.linear import apply_projected, compose_linear
from veneer.core.sites import LinearSite
from veneer.errors import TargetError
from veneer.model.inplace import InPlace, base_of
from veneer.model.linear import AdaptedSite
from veneer.quant.dense import DenseWeight

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class AdaptedConvolution(AdaptedSite):
    """Mixed in front of a convolution's class. A is a convolution like the layer itself, with r output channels; B
    acts on channels alone.
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
        records = [self.record(name, site) for name in names]
        base = self._product(x, cast(Tensor, self.effective("weight")))
        parts = []
        for name, record in zip(names, records, strict=True):
            a, dropped = cast(Tensor, record.a), self.dropped(x, name)
            parts.append((record, self._product((x if dropped is None else dropped).to(a.dtype), a)))
        y = apply_projected(compose_linear(records, site.bias), parts, base, site.bias)
        return y.movedim(-1, self._channels)

    def site(self, names: Sequence[str] | None = None) -> LinearSite:
        weight, bias = cast(Tensor, self.effective("weight", names)), self.effective("bias", names)
        return LinearSite(
            name=self.site_name,
            in_features=weight[0].numel(),
            out_features=weight.shape[0],
            has_bias=bias is not None,
            kind="convolution",
            window=tuple(weight.shape[2:]),
            weight=DenseWeight(weight.flatten(1)),
            bias=bias,
            row_sq=self._row_sq,
        )

    def stored(self, weight: Tensor) -> Tensor:
        return weight.reshape(self._kernel_shape)

    @property
    def _kernel_shape(self) -> tuple[int, ...]:
        return tuple(cast(Tensor, self._parameters["weight"]).shape)

    @property
    def _channels(self) -> int:
        """The dimension of the channels, counted from the end: there may be no batch in front."""
        return 1 - len(self._kernel_shape)

    def _product(self, x: Tensor, matrix: Tensor) -> Tensor:
        """A matrix (n, channels · window) times every patch of x that the layer's own kernel sees: (…, n)."""
        kernel = matrix.reshape(-1, *self._kernel_shape[1:])
        return cast(Tensor, cast(Any, self)._conv_forward(x, kernel, None)).movedim(self._channels, -1)


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution of torch with a kernel of its own; a class with a forward of its own (one that
    standardizes the kernel, say) is another map."""
    own = base_of(type(module)) if isinstance(module, InPlace) else type(module)
    plain = any(issubclass(own, cls) and own.forward is cls.forward for cls in _CONVOLUTIONS)
    return plain and module._parameters.get("weight") is not None


def shape_of_convolution(path: str, module: nn.Module) -> LinearSite:
    """A convolution described by its shape alone. Raises TargetError where its channels are in groups."""
    conv = cast(nn.Conv2d, module)
    if conv.groups > 1:
        raise TargetError(
            f"{path} is a convolution in {conv.groups} groups of channels: A would mix the groups, and no kernel could "
            "take such an update in. List it in exclude_modules, or name the other convolutions alone"
        )
    return LinearSite(
        name=path,
        in_features=conv.weight[0].numel(),
        out_features=conv.weight.shape[0],
        kind="convolution",
        window=tuple(conv.weight.shape[2:]),
    )
