"""Short causal convolution in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.paged_attention import PagedRows
from veneer.ops.state.conv import ConvKernel, GatedInput
from veneer.ops.state.windows import WindowStore


def conv_forward(given: GatedInput, kernel: ConvKernel, previous: Tensor) -> Tensor:
    value, _ = _value_and_slope(_sums(given, kernel, _seen(kernel, previous, given.x.device)), kernel)
    return (value if given.after is None else value * given.after.to(value.dtype)).to(given.x.dtype)


def windowed_conv(store: WindowStore, layer: int, given: GatedInput, kernel: ConvKernel, rows: PagedRows) -> Tensor:
    y, inputs = torch.empty_like(given.x), store.data[:, layer]
    for pages, position, first, stop in rows.sequences():
        places = torch.arange(max(0, position - kernel.weight.shape[1] + 1), position + stop - first)
        held = (torch.tensor(pages)[places // inputs.shape[1]], places % inputs.shape[1])
        own = slice(len(places) - (stop - first), None)
        inputs[held[0][own], held[1][own]] = _input(given)[first:stop]
        seen, previous = inputs[held], torch.arange(-1, len(places) - 1)
        found, _ = _value_and_slope(_sums(GatedInput(seen), kernel, _seen(kernel, previous, seen.device)), kernel)
        found = found[own] if given.after is None else found[own] * given.after[first:stop].to(found.dtype)
        y[first:stop] = found.to(y.dtype)
    return y


def conv_backward(
    dy: Tensor, given: GatedInput, kernel: ConvKernel, previous: Tensor, owns: tuple[bool, bool]
) -> tuple[GatedInput, Tensor]:
    seen = _seen(kernel, previous, given.x.device)
    value, slope = _value_and_slope(_sums(given, kernel, seen), kernel)
    before, x, after = (None if t is None else t.to(value.dtype) for t in given.tensors)
    assert x is not None
    wide = dy.to(value.dtype)
    dsum = wide * slope if after is None else wide * after * slope
    dz = torch.zeros_like(dsum)
    for rows, weight in zip(seen, kernel.weight.to(dsum.dtype).flip(1).unbind(1), strict=True):
        inside = rows >= 0
        dz.index_add_(0, rows[inside], dsum[inside] * weight)
    made = (  # all before one of them overwrites what it was made of
        None if before is None else dz * x,
        dz if before is None else dz * before,
        None if after is None else wide * value,
        value if after is None else value * after,
    )
    places = zip((*given.tensors, dy), made, (*[owns[0]] * 3, owns[1]), strict=True)
    dbefore, dx, dafter, y = (_given_back(own, new, is_owned) for own, new, is_owned in places)
    assert dx is not None
    assert y is not None
    return GatedInput(dx, dbefore, dafter), y


def _given_back(own: Tensor | None, new: Tensor | None, owns: bool) -> Tensor | None:
    """Return the result ``new`` in the dtype of ``own``, the argument whose memory it may overwrite.

    If ``owns``, copy it into ``own`` and return ``own``. Return None if either tensor is None.
    """
    if own is None or new is None:
        return None
    return own.copy_(new) if owns else new.to(own.dtype)


def _seen(kernel: ConvKernel, previous: Tensor, device: torch.device) -> list[Tensor]:
    """Return, for each column of the kernel, the row that every row reads: first itself, then the row before it in its
    sequence, and so on.

    The number is -1 if it would lie before the sequence's first row.
    """
    previous = torch.cat([previous.long(), previous.new_full((1,), -1).long()]).to(device)  # that of -1 is -1
    seen = [torch.arange(len(previous) - 1, device=device)]
    for _ in range(kernel.weight.shape[1] - 1):
        seen.append(previous[seen[-1]])
    return seen


def _sums(given: GatedInput, kernel: ConvKernel, seen: list[Tensor]) -> Tensor:
    """Return the sums of the convolution in at least float32: the bias, plus the products of each row's inputs with the
    weights, the farthest row first.
    """
    x, z = given.x, _input(given)
    wide = torch.promote_types(z.dtype, torch.float32)
    z = z.to(wide)
    z = torch.cat([z, z.new_zeros(1, z.shape[1])])  # row -1
    total = torch.zeros_like(z[:-1]) if kernel.bias is None else kernel.bias.to(wide).expand(len(x), -1)
    for rows, weight in zip(reversed(seen), kernel.weight.to(wide).unbind(1), strict=True):
        total = total + z[rows] * weight
    return total


def _input(given: GatedInput) -> Tensor:
    """Return the input of the convolution in x's dtype: x, or ``before * x`` (rounded once) if there is a gate
    ``before``.
    """
    wide = torch.promote_types(given.x.dtype, torch.float32)
    return given.x if given.before is None else (given.x.to(wide) * given.before.to(wide)).to(given.x.dtype)


def _value_and_slope(x: Tensor, kernel: ConvKernel) -> tuple[Tensor, Tensor | float]:
    if kernel.activation == "identity":
        return x, 1.0
    sigmoid = torch.sigmoid(x)
    return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
