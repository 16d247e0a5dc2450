"""Feed-forward half of a block, ``x + post_norm(Down(act(Gate n) * Up n))`` with n = norm(x), gated or not.

It is one autograd node with a hand-written backward, which keeps x, gate, up and the A-products. The normed x and the
gated product are computed again. gate and up are too if the half ``recomputes``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.model.fused.parts import Norm, add_onto, as_shape, parted, scaled, times
from veneer.ops.activation import activation_backward, activation_forward
from veneer.ops.glu import glu_backward, glu_forward
from veneer.ops.linear import op
from veneer.ops.linear.layer import LinearLayer, tensors_of


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpHalf:
    """Parts of one half as they act now.

    ``gate_up``: gate and up, or one layer that computes gate, then up, or up alone if not ``gated``. ``activation`` is
    one of `veneer.ops.glu.ACTIVATIONS`; without a gate, of `veneer.ops.activation.KINDS`. If it does not ``sum``, only
    its addition to the stream is returned, for bottlenecks to change; otherwise it is added times ``multiplier``.
    ``dtype`` is that of all values between the norm and the sum: the stream's, or bfloat16 with a float32 stream
    (autocast).
    """

    dtype: torch.dtype
    norm: Norm
    gate_up: tuple[LinearLayer, ...]
    down: LinearLayer
    activation: str
    gated: bool = True
    post_norm: Norm | None = None
    multiplier: float = 1.0
    recomputes: bool = False
    sums: bool = True

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Tensors of the records, which receive gradients."""
        return tensors_of((*self.gate_up, self.down))

    def hidden(self, inner: Sequence[Tensor]) -> Tensor:
        """Return the input of the down projection, from the outputs of ``gate_up``."""
        if not self.gated:
            return activation_forward(inner[0], self.activation)
        return glu_forward(*_gate_and_up(inner), self.activation)

    def inner_grads(self, dhidden: Tensor, inner: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """Return the gradients in the outputs of ``gate_up``, and, if it is gated, `hidden` again, in dhidden's memory.

        Recomputed outputs are overwritten.
        """
        if not self.gated:
            return [activation_backward(dhidden, inner[0], self.activation)], None
        gate, up = _gate_and_up(inner)
        dgate, dup, hidden = glu_backward(dhidden, gate, up, self.activation, owns_dh=True, owns_inputs=self.recomputes)
        if len(inner) == 2:
            return [dgate, dup], hidden
        return [inner[0] if self.recomputes else torch.cat([dgate, dup], dim=-1)], hidden

    def down_backward(
        self, dout: Tensor, inner: Sequence[Tensor], kept: op.SavedForBackward, input_grad: bool
    ) -> tuple[list[Tensor] | None, tuple[Tensor | None, ...]]:
        """Return the gradients in ``inner`` (None if not asked for), and in the records of the down projection.

        The factors' gradients read the hidden product, which is computed in the same pass as the inner gradients. If
        rows have records of their own, or if records scale it, it is computed before the projection.
        """
        if not (self.gated and input_grad and op.takes_input_late(self.down)):
            found = op.backward([dout], self.hidden(inner), kept, [self.down], input_grad=input_grad, owns_x=True)
            if not input_grad or found.x is None:
                return None, found.records
            return self.inner_grads(found.x, inner)[0], found.records
        grads: list[Tensor] = []

        def hidden(dhidden: Tensor) -> Tensor:
            found, made = self.inner_grads(dhidden, inner)
            grads.extend(found)
            return cast(Tensor, made)

        records = op.backward_before_input(dout, kept, self.down, hidden)
        return grads, records


def mlp_half(x: Float[Tensor, "b t d"], half: MlpHalf, stream: Tensor | None = None) -> Float[Tensor, "b t d"]:
    """Return the stream after the feed-forward half, or its addition. ``stream``: the summand if it is not x."""
    y: Tensor = _MlpHalf.apply(x, stream, half, *half.tensors)  # type: ignore[no-untyped-call]
    return y


class _MlpHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stream: Tensor | None, half: MlpHalf, *tensors: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1])
            normed, statistics = half.norm.forward(flat)
            inner, kept_inner = op.forward(normed.to(half.dtype), half.gate_up)
            del normed
            (out,), kept_down = op.forward(half.hidden(inner), [half.down], owns_x=True)
            kept_out: tuple[Tensor, ...] = ()
            if half.post_norm is not None:
                normed_out, statistics_out = half.post_norm.forward(out)
                kept_out, out = (out, statistics_out), normed_out
            if half.sums:
                summand = flat if stream is None else stream.reshape(flat.shape)
                out = add_onto(summand, times(out, half.multiplier))
        if half.recomputes:
            kept_inner = kept_inner.without_products()
        made_again = [half.recomputes or z is not None for z in kept_inner.products]
        kept_ys = tuple(None if again else y for y, again in zip(inner, made_again, strict=True))
        ctx.half, ctx.adds, ctx.streams = half, half.sums and stream is None, half.sums and stream is not None
        ctx.sizes = [len(t) for t in (kept_inner.tensors, kept_down.tensors, kept_ys)]
        ctx.save_for_backward(x, statistics, *kept_inner.tensors, *kept_down.tensors, *kept_ys, *kept_out)
        return as_shape(out, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        half, n_inner_tensors = ctx.half, len(tensors_of(ctx.half.gate_up))
        x, statistics, *rest = ctx.saved_tensors
        inner_kept, down_kept, inner, kept_out = parted(rest, ctx.sizes)
        kept_inner, kept_down = (
            op.SavedForBackward.of(inner_kept, half.gate_up),
            op.SavedForBackward.of(down_kept, [half.down]),
        )
        dstream = grads[0] if ctx.streams else None
        wanted = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[3 : 3 + n_inner_tensors])
        with torch.autocast(x.device.type, enabled=False):
            flat, dy = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, x.shape[-1])
            if half.recomputes:
                inner, again = op.forward(half.norm.forward(flat)[0].to(half.dtype), half.gate_up)
                kept_inner = replace(kept_inner, products=again.products)
            else:
                inner = op.outputs(inner, kept_inner, half.gate_up)
            dout = scaled(dy.to(half.dtype), half.multiplier if half.sums else 1.0)
            dout = dout if half.post_norm is None else half.post_norm.backward(dout, *kept_out)
            dinner, of_down = half.down_backward(dout, inner, kept_down, wanted)
            if dinner is None:
                return None, dstream, None, *(None,) * n_inner_tensors, *of_down
            del inner
            normed = half.norm.forward(flat)[0].to(half.dtype)
            found = op.backward(
                dinner, normed, kept_inner, half.gate_up, input_grad=ctx.needs_input_grad[0], overwrite=True
            )
            dx = None if found.x is None else half.norm.backward(found.x, flat, statistics)
            dx = None if dx is None else (dx.add_(dy) if ctx.adds else dx).view(x.shape)
        return dx, dstream, None, *found.records, *of_down


def _gate_and_up(inner: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    gate, up = inner if len(inner) == 2 else inner[0].chunk(2, dim=-1)
    return gate, up
