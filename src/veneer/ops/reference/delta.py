"""Gated delta rule with states in pages, in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from veneer.ops.paged_attention import PagedRows
from veneer.ops.state.delta import DeltaInput, DeltaWeights, StateShape, StateStore, of_length_1


def delta_in_pages(store: StateStore, layer: int, given: DeltaInput, weights: DeltaWeights, rows: PagedRows) -> Tensor:
    y = torch.empty(rows.n_rows, store.shape.width, dtype=given.z.dtype, device=given.z.device)
    for pages, position, first, stop in rows.sequences():
        for row in range(first, stop):
            at = position + row - first
            states = (store.data[pages[place // store.block], layer] for place in (at, max(at - 1, 0)))
            own, before = states
            if at % store.block == 0:
                own.copy_(before if at else torch.zeros_like(own))
            y[row] = _next(own, at, [x[row].flatten() for x in given.tensors], weights, store.shape)
    return y


def _next(state: Tensor, position: int, token: list[Tensor], weights: DeltaWeights, shape: StateShape) -> Tensor:
    """Return the output (width) of a token, and change the ``state`` before it to that after it."""
    q, k, v, z, b, a = token
    own = torch.cat([q, k, v])
    dtype, heads, width = own.dtype, shape.n_v_heads, shape.width
    scan = state[: width * shape.k_width].view(heads, shape.k_width, shape.v_width)
    inputs = state[width * shape.k_width :].view(shape.kernel - 1, shape.conv_width)
    qkv = _convolved(inputs, position, own, weights).to(dtype).float()
    keys = shape.n_k_heads * shape.k_width
    q, k = (of_length_1(x.view(shape.n_k_heads, -1)) for x in (qkv[:keys], qkv[keys : 2 * keys]))
    q, k = (x.repeat_interleave(heads // shape.n_k_heads, dim=0) for x in (q * shape.k_width**-0.5, k))
    decay = (-weights.rate * softplus(a.float() + weights.bias)).exp()[:, None]
    beta = (b.float().sigmoid().to(dtype) * weights.beta_scale).float()[:, None]
    seen = torch.einsum("hkv,hk->hv", scan, k)
    new = beta * (qkv[2 * keys :].view(heads, -1) - decay * seen)
    scan.mul_(decay[..., None]).add_(k[:, :, None] * new[:, None])
    out = torch.einsum("hkv,hk->hv", scan, q).to(dtype).float()
    normed = (out * torch.rsqrt(out.square().mean(-1, keepdim=True) + weights.eps)).to(dtype)
    return ((weights.norm.to(dtype) * normed).flatten().float() * silu(z.float())).to(dtype)


def _convolved(inputs: Tensor, position: int, x: Tensor, weights: DeltaWeights) -> Tensor:
    """Return the convolution of a token's input x after SiLU, and put x among the last ``inputs``."""
    kernel, bias = weights.kernel.values()
    total = torch.zeros(x.shape, device=x.device) if bias is None else bias.clone()
    for back in range(min(position, len(kernel) - 1), -1, -1):
        total += kernel[back] * (x.float() if back == 0 else inputs[(position - back) % len(inputs)])
    if len(inputs):
        inputs[position % len(inputs)] = x.float()
    return silu(total)
