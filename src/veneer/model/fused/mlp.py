"""The feed-forward half of a block, ``x + post_norm(Down(act(Gate n) * Up n))`` with n = norm(x).

One autograd node with a hand-written backward. Kept for it: x, gate, up and the A-products; the normed x and the gated
product are made again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.model.fused.parts import RmsNorm
from veneer.ops.glu import glu_backward, glu_forward
from veneer.ops.lora import Projection, lora_backward, lora_forward


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpHalf:
    """The parts of one half as they act now; ``activation`` is one of `veneer.ops.glu.ACTIVATIONS`."""

    norm: RmsNorm
    gate_up: tuple[Projection, Projection]
    down: Projection
    activation: str
    post_norm: RmsNorm | None = None

    @property
    def pairs(self) -> tuple[Tensor | None, ...]:
        """The low-rank factors, which gradients flow to."""
        return tuple(t for p in (*self.gate_up, self.down) for t in (p.a, p.b))


def mlp_half(x: Float[Tensor, "b t d"], half: MlpHalf) -> Float[Tensor, "b t d"]:
    """The stream after the feed-forward half."""
    y: Tensor = _MlpHalf.apply(x, half, *half.pairs)  # type: ignore[no-untyped-call]
    return y


class _MlpHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, half: MlpHalf, *pairs: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1])
            normed, rstd = half.norm.forward(flat)
            (gate, up), u = lora_forward(normed, half.gate_up)
            del normed
            hidden = glu_forward(gate, up, half.activation)
            (out,), u_down = lora_forward(hidden, [half.down])
            kept_out: tuple[Tensor, ...] = ()
            if half.post_norm is not None:
                normed_out, rstd_out = half.post_norm.forward(out)
                kept_out, out = (out, rstd_out), normed_out
            out.add_(flat)
        ctx.half = half
        ctx.save_for_backward(x, rstd, u, gate, up, u_down, *kept_out)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        half = ctx.half
        x, rstd, u, gate, up, u_down, *kept_out = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[2:6])
        with torch.autocast(x.device.type, enabled=False):
            flat, dy = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, x.shape[-1])
            dout = dy if half.post_norm is None else half.post_norm.backward(dy, *kept_out)
            hidden = glu_forward(gate, up, half.activation)
            down = lora_backward([dout], hidden, u_down, [half.down], input_grad=wanted)
            if not wanted or down.x is None:
                return None, None, *(None,) * 4, *down.a, *down.b
            dgate, dup, _ = glu_backward(down.x, gate, up, half.activation)
            del hidden
            normed, _ = half.norm.forward(flat)
            found = lora_backward([dgate, dup], normed, u, half.gate_up, input_grad=ctx.needs_input_grad[0])
            dx = None if found.x is None else half.norm.backward(found.x, flat, rstd).add_(dy).view(x.shape)
        pairs = (g for pair in zip((*found.a, *down.a), (*found.b, *down.b), strict=True) for g in pair)
        return dx, None, *pairs
