"""Attention over packed sequences: a dense masked softmax in float64 under autograd is the oracle."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from bench.kernels.differentiable import attention
from gradients import has_exact_gradients
from veneer.errors import ConfigError, ShapeError
from veneer.ops import forks
from veneer.ops.attention import AttentionOptions, alibi_slopes, attention_forward

OP = "attention.attention_forward"
DTYPES = [torch.float32, torch.bfloat16]


def draw(bounds, q_heads, kv_heads, head_dim):
    n = bounds[-1]
    generator = torch.Generator().manual_seed(n + head_dim)
    q = torch.randn(n, q_heads, head_dim, generator=generator) * 1.5
    k, v = torch.randn(2, n, kv_heads, head_dim, generator=generator) * 1.5
    return [q, k, v, torch.randn(n, q_heads, head_dim, generator=generator)]


def dense(q, k, v, bounds, options, sinks=None):
    """Every sequence by itself, with a dense mask, in q's dtype (probabilities too)."""
    group = q.shape[1] // k.shape[1]
    outs = []
    for start, stop in pairwise(bounds):
        qs, ks, vs = (x[start:stop].transpose(0, 1) for x in (q, k, v))
        ks, vs = ks.repeat_interleave(group, 0), vs.repeat_interleave(group, 0)
        scores = qs @ ks.mT * (q.shape[-1] ** -0.5 if options.scale is None else options.scale)
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        t = torch.arange(stop - start)
        ahead = t[:, None] - t[None]
        if options.slopes is not None:
            scores = scores - torch.tensor(options.slopes, dtype=scores.dtype)[:, None, None] * ahead
        hidden = (ahead < 0) | (ahead >= (options.window or stop))
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(-1, len(t), 1)], dim=-1)
        outs.append((scores.softmax(-1)[..., : len(t)] @ vs).transpose(0, 1))
    return torch.cat(outs)


def results(function, tensors, dtype):
    leaves = [t.to(dtype).requires_grad_() for t in tensors[:3]]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3].to(dtype))]


def compare(tensors, bounds, options, dtype, slack=8.0, sinks=None):
    """``slack`` multiplies the rounding of the largest value: dP and
    its row sum come from different sums and cancel, and where scores are large, their own rounding dominates."""
    tensors = [t.to(dtype) for t in tensors]
    cu = torch.tensor(bounds, dtype=torch.int32)
    ours = results(lambda q, k, v: attention(q, k, v, cu, options, sinks=sinks), tensors, dtype)
    plain = results(lambda q, k, v: dense(q, k, v, bounds, options, sinks), tensors, dtype)
    exact = results(lambda q, k, v: dense(q, k, v, bounds, options, sinks), tensors, torch.float64)
    for name, got, theirs, truth in zip(("out", "dq", "dk", "dv"), ours, plain, exact, strict=True):
        error, allowed = (got.double() - truth).abs(), (theirs.double() - truth).abs()
        floor = (slack if dtype == torch.float32 else 1) * torch.finfo(dtype).eps * truth.abs().max()
        assert got.dtype == dtype
        assert error.max() <= 2 * allowed.max() + floor, name
        assert error.pow(2).mean().sqrt() <= 2 * allowed.pow(2).mean().sqrt() + floor / 4, name


CASES = [
    ([0, 7], 1, 1, 3, {}),
    ([0, 37], 3, 1, 16, {}),
    ([0, 5, 5, 6, 71, 201], 4, 2, 64, {}),
    ([0, 129, 131], 6, 3, 24, {"window": 17}),
    ([0, 67, 150], 3, 3, 80, {"softcap": 2.5}),
    ([0, 83], 2, 1, 128, {"scale": 0.031, "window": 64, "softcap": 1.5}),
    ([0, 91, 100], 2, 2, 256, {"window": 2}),
    ([0, 333], 2, 1, 32, {"window": 100}),
    ([0, 19, 67], 6, 3, 24, {"slopes": alibi_slopes(6), "scale": 0.3}),
    ([0, 5, 71], 3, 1, 14, {"slopes": alibi_slopes(3), "window": 31}),
]
# In float32 Triton's tiles have 32 tokens or 16, and its interpreter is slow: sequences of two to four tiles.
SHORTER = {201: [0, 5, 5, 6, 71], 131: [0, 77, 79], 150: [0, 35, 78], 100: [0, 49, 58], 333: [0, 133]}


@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped("case", CASES)
def test_output_and_gradients(case, dtype, backend):
    bounds, q_heads, kv_heads, head_dim, options = case
    if backend == "triton" and dtype == torch.float32:
        bounds = SHORTER.get(bounds[-1], bounds)
    compare(draw(bounds, q_heads, kv_heads, head_dim), bounds, AttentionOptions(**options, backend=backend), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"window": 5, "softcap": 2.5}])
def test_sinks_take_a_share_of_the_softmax(options, dtype, backend):
    """One far below the scores, one far above, and some among them."""
    bounds, sinks = [0, 1, 24, 47], torch.tensor([-40.0, 25.0, 0.3, -1.7, 2.1, 0.0])
    compare(draw(bounds, 6, 3, 24), bounds, AttentionOptions(**options, backend=backend), dtype, sinks=sinks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(dtype, backend):
    tensors = draw([0, 50], 2, 1, 32)
    tensors[0] *= 40
    # e^s errs by the rounding of s, and scores go up to 399
    compare(tensors, [0, 50], AttentionOptions(backend=backend), dtype, slack=400)


@pytest.mark.parametrize("dtype", DTYPES)
def test_window_of_one_returns_the_values(dtype, backend):
    q, k, v, dout = (t.to(dtype) for t in draw([0, 21], 2, 2, 32))
    out, dq, _, dv = results(
        lambda q, k, v: attention(q, k, v, torch.tensor([0, 21]), AttentionOptions(window=1, backend=backend)),
        (q, k, v, dout),
        dtype,
    )
    assert torch.equal(out, v)
    assert torch.equal(dv, dout)
    assert dq.abs().max() <= 50 * torch.finfo(dtype).eps


def test_equals_torch_on_a_batch(backend):
    q, k, v, _ = draw([0, 3 * 70], 6, 2, 32)
    got = attention(q, k, v, torch.arange(0, 211, 70), AttentionOptions(backend=backend)).unflatten(0, (3, 70))
    rows = [x.unflatten(0, (3, 70)).transpose(1, 2) for x in (q, k, v)]
    wanted = functional.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_one_projection(backend, dtype):
    """q, k and v read through strides, without a copy."""
    joined = torch.randn(90, 4 * 32, generator=torch.Generator().manual_seed(3)).to(dtype).unflatten(1, (4, 32))
    q, k, v = joined[:, :2], joined[:, 2:3], joined[:, 3:]
    cu, options = torch.tensor([0, 40, 90]), AttentionOptions(backend=backend)
    wanted = attention(*(x.contiguous() for x in (q, k, v)), cu, options)
    assert torch.equal(attention(q, k, v, cu, options), wanted)


def test_float64_gradcheck(backend):
    tensors = [t.double().requires_grad_() for t in draw([0, 3, 8], 2, 1, 4)[:3]]
    options = AttentionOptions(window=3, softcap=1.5, backend=backend)
    assert has_exact_gradients(lambda q, k, v: attention(q, k, v, torch.tensor([0, 3, 8]), options), tensors)


@pytest.mark.usefixtures("own_checks")
def test_errors():
    with pytest.raises(ConfigError, match="window=0"):
        AttentionOptions(window=0)
    with pytest.raises(ConfigError, match="softcap=-1"):
        AttentionOptions(softcap=-1.0)
    with pytest.raises(ConfigError, match="caps scores that have a bias"):
        AttentionOptions(softcap=2.0, slopes=(0.5,))
    q, k = torch.zeros(5, 3, 8), torch.zeros(5, 2, 8)
    with pytest.raises(ShapeError, match="multiple of kv_heads"):
        attention(q, k, k, torch.tensor([0, 5]))
    with pytest.raises(ShapeError, match="multiple of kv_heads"):
        attention(q, k[:, :0], k[:, :0], torch.tensor([0, 5]))
    with pytest.raises(ConfigError, match="slopes shift a query's scores"):
        attention(q, q, q, torch.tensor([0, 5]), AttentionOptions(slopes=(0.5,) * 3), sinks=torch.zeros(3))
    for sinks in (torch.zeros(2), torch.zeros(3).double()):
        with pytest.raises(ShapeError, match=r"sinks must be contiguous float32 of \(3,\)"):
            attention(q, q, q, torch.tensor([0, 5]), sinks=sinks)
    for wrong in ([0, 4], [1, 5], [0, 3, 2, 5], [5]):
        with pytest.raises(ShapeError, match="cu_seqlens"):
            attention(q, q, q, torch.tensor(wrong))


FORKS = [
    # bounds, forks, heads, options: two prompts; the first branch goes on in its prompt's sequence
    ([0, 9, 13, 14, 20, 31], [(slice(0, 5), slice(9, 14)), (slice(14, 18), slice(20, 31))], (4, 2, 16), {}),
    ([0, 11, 30, 49], [(slice(0, 7), slice(11, 49))], (3, 3, 8), {"window": 9, "softcap": 1.5}),
    ([0, 40, 41, 60], [(slice(0, 40), slice(40, 60))], (2, 1, 32), {"window": 3, "scale": 0.2}),
    ([0, 6, 12], [(slice(0, 1), slice(6, 12))], (2, 2, 5), {"softcap": 2.5}),
    ([0, 11, 30, 49], [(slice(0, 7), slice(11, 49))], (3, 3, 8), {"slopes": alibi_slopes(3)}),
]


@pytest.mark.looped("dtype", [*DTYPES, torch.float64])
@pytest.mark.looped("case", FORKS)
def test_branches_see_their_stem(case, dtype, backend, monkeypatch):
    """The same tokens as rows of their own, stem and branch, give the same outputs and gradients."""
    bounds, given, (q_heads, kv_heads, head_dim), options = case
    monkeypatch.setattr(forks, "SCORES", 300)  # a few queries at once
    tensors = [t.to(dtype) for t in draw(bounds, q_heads, kv_heads, head_dim)]
    cu, how = torch.tensor(bounds), AttentionOptions(**options, backend=backend)
    parted = [forks.Fork(*each) for each in given]
    ours = results(lambda q, k, v: attention(q, k, v, cu, how, parted), tensors, dtype)
    exact, plain = (
        results(lambda q, k, v: by_paths(q, k, v, bounds, parted, how), tensors, t) for t in (torch.float64, dtype)
    )
    for name, got, truth, theirs in zip(("out", "dq", "dk", "dv"), ours, exact, plain, strict=True):
        allowed = 4 * (theirs.double() - truth).abs().max() + 16 * torch.finfo(dtype).eps * truth.abs().max()
        assert (got.double() - truth).abs().max() <= allowed, name


def by_paths(q, k, v, bounds, parted, options):
    """Each sequence behind its stem, as one of its own."""
    outs = []
    for start, stop in pairwise(bounds):
        stem = next((f.stem for f in parted if f.branches.start <= start < f.branches.stop), slice(0, 0))
        qs, ks, vs = (torch.cat([x[stem], x[start:stop]]) for x in (q, k, v))
        outs.append(dense(qs, ks, vs, [0, len(qs)], options)[stem.stop - stem.start :])
    return torch.cat(outs)


def test_the_bias_of_far_keys_is_exact_in_16_bits(backend):
    """Beyond 256 positions, for slopes that 16 bits do not hold: queries and keys of zero leave the bias alone."""
    n, slopes = 1500, alibi_slopes(6)
    q, v = torch.zeros(n, 6, 16, dtype=torch.bfloat16), torch.zeros(n, 6, 16, dtype=torch.bfloat16)
    options = AttentionOptions(scale=0.3, slopes=slopes, backend=backend)
    _, lse = attention_forward(q, q, v, torch.tensor([0, n]), options)
    place = torch.arange(n, dtype=torch.float64)
    for head, slope in enumerate(slopes):
        exact = torch.logcumsumexp(slope * place, dim=0)
        assert (lse[head].double() - exact).abs().max() <= 1e-4 * max(1.0, slope * n)
