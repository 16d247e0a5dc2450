"""Scans: the recurrence token by token in float64, each sequence alone.

A scan sums the logarithms of decays over a chunk, up to 128 here. Differences of such sums have their rounding.
"""

from itertools import pairwise

import pytest
import torch

from veneer.errors import ShapeError
from veneer.ops.forks import Fork
from veneer.ops.state.scan import ScanInput, scan

BOUNDS = torch.tensor([0, 1, 3, 3, 74, 97, 237])  # an empty sequence, parts of chunks, more than two chunks
SUMS = 128  # the largest sum of decays' logarithms of a chunk
HEADS = [(1, 1), (3, 3), (3, 6)]


def draw(heads, dtype, *, d_k=13, d_v=7):
    n, (h_k, h) = int(BOUNDS[-1]), heads
    generator = torch.Generator().manual_seed(h)
    q, k, v = (torch.randn(n, *shape, generator=generator) for shape in ((h_k, d_k), (h_k, d_k), (h, d_v)))
    decay, beta = -2 * torch.rand(n, h, generator=generator), torch.rand(n, h, generator=generator)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    given = ScanInput(*(x.to(dtype) for x in (q, k, v, decay, beta)))
    return given, torch.randn(n, h, d_v, generator=generator).to(dtype)


def recurrent(given, *, delta):
    """The same token by token."""
    q, k, v, log_decay, beta = given.tensors
    group, found = v.shape[1] // q.shape[1], []
    q, k = (x.repeat_interleave(group, dim=1) for x in (q, k))
    for start, stop in pairwise(BOUNDS.tolist()):
        state = torch.zeros(v.shape[1], q.shape[2], v.shape[2], dtype=v.dtype)
        for t in range(start, stop):
            state = log_decay[t].exp()[:, None, None] * state
            held = torch.einsum("hkv,hk->hv", state, k[t]) if delta else 0
            state = state + torch.einsum("hk,hv->hkv", k[t], beta[t, :, None] * (v[t] - held))
            found.append(torch.einsum("hkv,hk->hv", state, q[t]))
    return torch.stack(found)


def results(compute, given, dy, dtype):
    leaves = [x.to(dtype).detach().requires_grad_() for x in given.tensors]
    y = compute(ScanInput(*leaves))
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]


def ours(given, dy, *, delta, bounds=BOUNDS, forks=()):
    return results(lambda each: scan(each, bounds, delta=delta, forks=forks), given, dy, given.v.dtype)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_scan_is_the_recurrence_of_each_sequence(heads, dtype, delta) -> None:
    given, dy = draw(heads, dtype)
    exact, plain = (results(lambda x: recurrent(x, delta=delta), given, dy, each) for each in (torch.float64, dtype))
    for found, own, wanted in zip(ours(given, dy, delta=delta), plain, exact, strict=True):
        assert found.dtype == dtype
        allowed = 2 * (own.double() - wanted).norm() + SUMS * torch.finfo(dtype).eps / 2 * wanted.norm()
        assert (found.double() - wanted).norm() <= allowed


@pytest.mark.parametrize("delta", [False, True])
def test_halves_are_summed_in_float32(delta) -> None:
    given, dy = draw((3, 6), torch.bfloat16)
    exact = results(lambda x: recurrent(x, delta=delta), given, dy, torch.float64)
    for found, wanted in zip(ours(given, dy, delta=delta), exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.double() - wanted).norm() <= 4e-3 * wanted.norm()


@pytest.mark.parametrize("delta", [False, True])
def test_a_sequence_reads_nothing_of_another(delta) -> None:
    given, dy = draw((3, 6), torch.float32)
    own = slice(74, 97)
    alone = ScanInput(*(x[own] for x in given.tensors))
    moved = ScanInput(*(torch.cat([x[:74] * 0.5, x[own], x[97:].flip(0)]) for x in given.tensors))
    packed, other = (ours(each, dy, delta=delta) for each in (given, moved))
    expected = ours(alone, dy[own], delta=delta, bounds=torch.tensor([0, 23]))
    for found, same, wanted in zip(packed, other, expected, strict=True):
        torch.testing.assert_close(found[own], same[own], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[own], wanted, rtol=1e-5, atol=1e-5)


def test_fast_decays_leave_finite_gradients() -> None:
    given, dy = draw((1, 1), torch.float32)
    fast = ScanInput(given.q, given.k, given.v, given.log_decay * 100, given.beta)
    assert all(bool(x.isfinite().all()) for x in ours(fast, dy, delta=True))


@pytest.mark.parametrize("delta", [False, True])
def test_a_branch_goes_on_where_its_stem_ends(delta) -> None:
    given, dy = draw((3, 6), torch.float32)
    found = ours(
        given, dy, delta=delta, forks=(Fork(slice(3, 74), slice(74, 237)), Fork(slice(74, 97), slice(97, 237)))
    )

    def apart(whole):
        stems = (range(3), range(3, 74), range(3, 97), range(3, 237))
        bounds = [torch.tensor([0, 1, 3]), *(torch.tensor([0, len(rows)]) for rows in stems[1:])]
        parts = [
            scan(ScanInput(*(x[list(rows)] for x in whole.tensors)), bound, delta=delta)[-n:]
            for rows, bound, n in zip(stems, bounds, (3, 71, 23, 140), strict=True)
        ]
        return torch.cat(parts)

    for own, wanted in zip(found, results(apart, given, dy, torch.float32), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-4)


def test_rows_of_no_sequence_are_none() -> None:
    given, _ = draw((3, 6), torch.float32)
    empty = ScanInput(*(x[:0] for x in given.tensors))
    assert scan(empty, torch.tensor([0]), delta=True).shape == (0, 6, 7)


def test_parts_that_do_not_fit_are_refused() -> None:
    given, _ = draw((3, 4), torch.float32)
    with pytest.raises(ShapeError, match="h a multiple of h_k"):
        scan(given, BOUNDS, delta=True)
    given, _ = draw((3, 6), torch.float32)
    with pytest.raises(ShapeError, match=r"bounds from \[0\] to \[97\]"):
        scan(given, BOUNDS[:-1], delta=True)
    for bounds in ([3, 97, 100], [0, 60, 20, len(given.v)]):
        with pytest.raises(ShapeError, match="that rise from 0 to n"):
            scan(given, torch.tensor(bounds), delta=True)
