"""Reading of a short convolution in attention's place: one layer in front of it, one behind it, two gates."""

from __future__ import annotations

from torch import nn

from veneer.model.blueprint.linears import is_linear, read_linear
from veneer.model.blueprint.parts import ShortConv
from veneer.model.blueprint.source import BlockSource, undescribed

INNER, CONV, OUT = "in_proj", "conv", "out_proj"


def read_short_conv(source: BlockSource, module: nn.Module) -> ShortConv | None:
    """Return the description of a short convolution, or None if ``module`` has another form."""
    inner, conv, out = (getattr(module, name, None) for name in (INNER, CONV, OUT))
    if not isinstance(inner, nn.Module) or not isinstance(conv, nn.Conv1d) or not isinstance(out, nn.Module):
        return None
    if not is_linear(inner) or not is_linear(out) or any(undescribed(source, module, [inner, conv, out])):
        return None
    inside, after = read_linear(source, inner, "conv_in"), read_linear(source, out, "conv_out")
    [kernel], width = conv.kernel_size, conv.in_channels
    by_channel = conv.groups == width == conv.out_channels == after.in_features
    plain = conv.stride == conv.dilation == (1,) and conv.padding == (kernel - 1,)
    if not by_channel or not plain or inside.out_features != 3 * width:
        return None
    return ShortConv(
        path=source.path(module),
        inner=inside,
        conv=source.path(conv),
        kernel=kernel,
        bias=conv.bias is not None,
        out=after,
    )
