"""Experts in training: outputs and gradients are autograd's, on the choices that a router makes."""

import pytest
import torch
from torch.nn import functional

from veneer.ops.experts import Router, route
from veneer.ops.linear.experts import ChosenExperts, ExpertLayers, TrainedExperts, route_backward
from veneer.records.terms.pair import Pair

N, N_EXPERTS, TOP_K, D, WIDTH, RANK = 31, 7, 3, 41, 19, 5


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

    experts = TrainedExperts(*(ExpertLayers(stack.unbind()) for stack in stacks), "silu")
    ids, weights = route(scores, router)
    chosen = ChosenExperts.of(ids, N_EXPERTS, x)
    found, kept = experts.forward(x, chosen, weights)
    before = kept.hidden.clone()
    grads = experts.backward(dy, x, kept, chosen, weights)
    dscores = route_backward(grads.weights, scores, ids, router)
    assert torch.equal(kept.hidden, before)
    assert grads.pairs == ()
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22
    for one, right in ((found, y), (grads.x, own_x.grad), (dscores, own_scores.grad)):
        assert one.dtype == dtype
        assert (one.double() - right).abs().max() <= 4 * unit * right.abs().max()
    assert len(list(chosen.each())) == N_EXPERTS - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_and_clamped_units(dtype):
    """gpt-oss: gates alternate with the values that they multiply, and the weights' gradients see the second bias."""
    x, scores, dy = draw(N, D, dtype=dtype), draw(N, N_EXPERTS, dtype=dtype), draw(N, D, dtype=dtype, seed=1)
    router = Router(n_experts=N_EXPERTS, top_k=TOP_K)
    scale = 0.8 if dtype == torch.float32 else 0.15  # within the bounds, to which 16 bits round values from outside
    stacks = scale * draw(N_EXPERTS, 2 * WIDTH, D, dtype=dtype), 0.3 * draw(N_EXPERTS, D, WIDTH, dtype=dtype)
    biases = draw(N_EXPERTS, 2 * WIDTH, dtype=dtype, seed=2), draw(N_EXPERTS, D, dtype=dtype, seed=3)
    own_x, own_scores = (each.double().requires_grad_() for each in (x, scores))
    best, ids = own_scores.topk(TOP_K)
    inner = torch.einsum("nd,eod->neo", own_x, stacks[0].double()) + biases[0].double()
    gate, up = inner[..., ::2].clamp(max=7), inner[..., 1::2].clamp(-7, 7)
    every = torch.einsum("neo,edo->ned", (up + 1) * gate * torch.sigmoid(1.702 * gate), stacks[1].double())
    every = (every + biases[1].double()).gather(1, ids[:, :, None].expand(-1, -1, D))
    y = (every * best.softmax(-1)[:, :, None]).sum(1)
    y.backward(dy.double())

    layers = (ExpertLayers(stack.unbind(), bias=bias) for stack, bias in zip(stacks, biases, strict=True))
    experts, (ids, weights) = TrainedExperts(*layers, "swiglu_oai"), route(scores, router)
    chosen = ChosenExperts.of(ids, N_EXPERTS, x)
    found, kept = experts.forward(x, chosen, weights)
    grads = experts.backward(dy, x, kept, chosen, weights)
    dscores = route_backward(grads.weights, scores, ids, router)
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22
    for one, right in ((found, y), (grads.x, own_x.grad), (dscores, own_scores.grad)):
        assert one.dtype == dtype
        assert (one.double() - right).abs().max() <= 4 * unit * right.abs().max()


def drawn_pair(o, i, scale, dtype):
    """A and B in the layout that PEFT's form has: the experts of B side by side."""
    a, b = draw(N_EXPERTS, RANK, i, dtype=dtype), draw(o, RANK, N_EXPERTS, dtype=dtype).permute(2, 0, 1)
    return Pair(a=a.requires_grad_(), b=(0.2 * b).requires_grad_(), scale=scale)


@pytest.mark.parametrize("adapted", ["both", "inner", "down"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_of_experts(dtype, adapted):
    """Factors in float32, as they are trained, beside rows of either dtype."""
    x, scores, dy = draw(N, D, dtype=dtype), draw(N, N_EXPERTS), draw(N, D, dtype=dtype, seed=1)
    scores[:, 5] = -20.0  # chosen by none
    router = Router(n_experts=N_EXPERTS, top_k=TOP_K)
    stacks = 0.3 * draw(N_EXPERTS, 2 * WIDTH, D, dtype=dtype), 0.3 * draw(N_EXPERTS, D, WIDTH, dtype=dtype)
    sizes = {"inner": (2 * WIDTH, D, 0.7), "down": (D, WIDTH, 1.3)}
    pairs = [drawn_pair(*size, torch.float32) if adapted in (n, "both") else None for n, size in sizes.items()]
    wide = [stack.double() for stack in stacks]
    there = [(place, pair) for place, pair in enumerate(pairs) if pair is not None]
    factors = [t.detach().double().requires_grad_() for _, pair in there for t in (pair.a, pair.b)]
    for k, (place, pair) in enumerate(there):
        wide[place] = wide[place] + pair.scale * factors[2 * k + 1] @ factors[2 * k]
    y, own_x, _ = by_autograd(x, scores, router, *wide)
    y.backward(dy.double())

    layers = (ExpertLayers(stack.unbind(), pair) for stack, pair in zip(stacks, pairs, strict=True))
    experts, (ids, weights) = TrainedExperts(*layers, "silu"), route(scores, router)
    chosen = ChosenExperts.of(ids, N_EXPERTS, x)
    with torch.no_grad():
        found, kept = experts.forward(x, chosen, weights)
        grads = experts.backward(dy, x, kept, chosen, weights)
    assert len(grads.pairs) == len(experts.tensors) == len(factors)
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22
    each = zip(grads.pairs, (factor.grad for factor in factors), strict=True)
    for one, right in ((found, y), (grads.x, own_x.grad), *each):
        assert (one.double() - right).abs().max() <= 4 * unit * right.abs().max()
    assert all(gradient.dtype == torch.float32 and not gradient[5].any() for gradient in grads.pairs)


def test_a_frozen_factor_has_no_gradient():
    x, scores, dy = draw(N, D), draw(N, N_EXPERTS), draw(N, D, seed=1)
    pair = drawn_pair(D, WIDTH, 1.3, torch.float32)
    pair.a.requires_grad_(False)
    layers = (
        ExpertLayers(draw(N_EXPERTS, 2 * WIDTH, D).unbind()),
        ExpertLayers(draw(N_EXPERTS, D, WIDTH).unbind(), pair),
    )
    experts, (ids, weights) = TrainedExperts(*layers, "silu"), route(scores, Router(n_experts=N_EXPERTS, top_k=TOP_K))
    chosen = ChosenExperts.of(ids, N_EXPERTS, x)
    with torch.no_grad():
        _, kept = experts.forward(x, chosen, weights)
        da, db = experts.backward(dy, x, kept, chosen, weights).pairs
    assert da is None
    assert db is not None


def test_the_owner_of_each_row_is_sent_once_for_both_layers_and_passes():
    """On a GPU: the runs of a choice are equal wherever they are made."""
    owners = pytest.importorskip("veneer.ops.triton.grouped_low_rank", reason="needs the package triton")
    owners._owner.cache_clear()
    for k in range(3):
        chosen = ChosenExperts.of(torch.randint(N_EXPERTS, (N, TOP_K)), N_EXPERTS, torch.empty(0))
        for _ in range(4):
            owners._owner(chosen.runs, torch.device("cpu"))
        assert owners._owner.cache_info()[:2] == (3 * (k + 1), k + 1)
