"""Experts in training: outputs and gradients are autograd's, on the choices that a router makes."""

import pytest
import torch
from torch.nn import functional

from veneer.ops.experts import Router, route
from veneer.ops.linear.experts import ChosenExperts, FrozenExperts, route_backward

N, N_EXPERTS, TOP_K, D, WIDTH = 31, 7, 3, 41, 19


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).to(dtype)


def by_autograd(x, scores, router, gate_up, down):
    """The sum over experts, and the gradients in x and scores, in float64."""
    x, scores = (each.detach().double().requires_grad_() for each in (x, scores))
    values = scores.softmax(-1)
    weights, ids = values.topk(router.top_k)
    weights = weights / weights.sum(-1, keepdim=True) if router.normalized else weights
    gate, up = torch.einsum("nd,eod->neo", x, gate_up.double()).chunk(2, dim=-1)
    every = torch.einsum("neo,edo->ned", functional.silu(gate) * up, down.double())
    y = (every.gather(1, ids[:, :, None].expand(-1, -1, D)) * (weights * router.scale)[:, :, None]).sum(1)
    return y, x, scores


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients(dtype, normalized):
    x, scores, dy = draw(N, D, dtype=dtype), draw(N, N_EXPERTS, dtype=dtype), draw(N, D, dtype=dtype, seed=1)
    scores[:, 5] = -20.0  # chosen by none
    router = Router(n_experts=N_EXPERTS, top_k=TOP_K, normalized=normalized, scale=1.3)
    stacks = 0.3 * draw(N_EXPERTS, 2 * WIDTH, D, dtype=dtype), 0.3 * draw(N_EXPERTS, D, WIDTH, dtype=dtype)
    y, own_x, own_scores = by_autograd(x, scores, router, *stacks)
    y.backward(dy.double())

    experts = FrozenExperts(*(stack.unbind() for stack in stacks), "silu")
    ids, weights = route(scores, router)
    chosen = ChosenExperts.of(ids, N_EXPERTS, x)
    found, hidden = experts.forward(x, chosen, weights)
    before = hidden.clone()
    dx, dweights = experts.backward(dy, hidden, chosen, weights)
    dscores = route_backward(dweights, scores, ids, router)
    assert torch.equal(hidden, before)
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22
    for one, right in ((found, y), (dx, own_x.grad), (dscores, own_scores.grad)):
        assert one.dtype == dtype
        assert (one.double() - right).abs().max() <= 4 * unit * right.abs().max()
    assert len(list(chosen.each())) == N_EXPERTS - 1
