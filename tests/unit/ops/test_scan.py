"""Scans: the recurrence token by token in float64, each sequence alone.

A scan sums the logarithms of decays over a chunk, up to 128 here. Differences of such sums have their rounding.
"""

from itertools import pairwise

import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from veneer.errors import ShapeError
from veneer.ops.forks import Fork
from veneer.ops.state.scan import ScanInput, scan

OP = "scan.scan"
BOUNDS = torch.tensor([0, 1, 3, 3, 74, 97, 237])  # an empty sequence, parts of chunks, more than two chunks
SUMS = 128  # the largest sum of decays' logarithms of a chunk
HEADS = [(1, 1), (3, 3), (3, 6)]


WIDTHS = [(13, 7), (33, 70), (128, 128)]


def draw(heads, dtype, *, widths=WIDTHS[0]):
    n, (h_k, h), (d_k, d_v) = int(BOUNDS[-1]), heads, widths
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


def ours(given, dy, *, delta, bounds=BOUNDS, forks=(), backend=None):
    def compute(each):
        return scan(each, bounds, delta=delta, forks=forks, backend=backend)

    return results(compute, given, dy, given.v.dtype)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.looped("widths", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_scan_is_the_recurrence_of_each_sequence(heads, widths, dtype, delta, backend) -> None:
    given, dy = draw(heads, dtype, widths=widths)
    exact, plain = (results(lambda x: recurrent(x, delta=delta), given, dy, each) for each in (torch.float64, dtype))
    for found, own, wanted in zip(ours(given, dy, delta=delta, backend=backend), plain, exact, strict=True):
        assert found.dtype == dtype
        allowed = 2 * (own.double() - wanted).norm() + SUMS * torch.finfo(dtype).eps / 2 * wanted.norm()
        assert (found.double() - wanted).norm() <= allowed


@pytest.mark.parametrize("delta", [False, True])
def test_halves_are_summed_in_float32(delta, backend) -> None:
    given, dy = draw((3, 6), torch.bfloat16)
    exact = results(lambda x: recurrent(x, delta=delta), given, dy, torch.float64)
    for found, wanted in zip(ours(given, dy, delta=delta, backend=backend), exact, strict=True):
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


def test_fast_decays_leave_finite_gradients(backend) -> None:
    given, dy = draw((1, 1), torch.float32)
    fast = ScanInput(given.q, given.k, given.v, given.log_decay * 100, given.beta)
    assert all(bool(x.isfinite().all()) for x in ours(fast, dy, delta=True, backend=backend))


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


def test_gradients_of_the_specification_are_those_of_differences() -> None:
    given, _ = draw((2, 4), torch.float64, widths=(3, 2))
    first = [x[:67].requires_grad_() for x in given.tensors]  # two chunks
    bounds = torch.tensor([0, 1, 67])

    def compute(*parts):
        return scan(ScanInput(*parts), bounds, delta=True, backend="reference")

    assert torch.autograd.gradcheck(compute, first, fast_mode=True)


def test_a_scan_is_that_of_transformers(backend) -> None:
    given, dy = draw((3, 3), torch.float32, widths=(33, 70))
    own = slice(97, 237)

    def theirs(each):
        q, k, v, log_decay, beta = (x[None, own] for x in each.tensors)
        scaled = q * q.shape[-1] ** 0.5  # the module divides by it
        return torch_chunk_gated_delta_rule(scaled, k, v, g=log_decay, beta=beta)[0][0]

    def of_one(each):
        part = ScanInput(*(x[own] for x in each.tensors))
        return scan(part, torch.tensor([0, 140]), delta=True, backend=backend)

    for found, wanted in zip(*(results(f, given, dy[own], torch.float32) for f in (of_one, theirs)), strict=True):
        assert (found - wanted).norm() <= 5e-6 * wanted.norm()


def test_a_known_result_changes_no_gradient(backend) -> None:
    given, dy = draw((3, 6), torch.float32)
    wanted = ours(given, dy, delta=True, backend=backend)
    known = wanted[0] if backend == "reference" else wanted[0] + 1  # not computed again

    def compute(each):
        return scan(each, BOUNDS, delta=True, known=known, backend=backend)

    found, *gradients = results(compute, given, dy, torch.float32)
    assert torch.equal(found, known)
    assert all(torch.equal(x, same) for x, same in zip(gradients, wanted[1:], strict=True))
    with pytest.raises(ShapeError, match=r"a known result like the values.*\(236, 6, 7\) torch.float32 result"):
        scan(given, BOUNDS, delta=True, known=known[1:], backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_sequence_has_the_bits_of_it_alone(dtype) -> None:
    given, dy = draw((3, 6), dtype, widths=(33, 70))
    packed = ours(given, dy, delta=True, backend="cpu")
    for start, stop in pairwise(BOUNDS.tolist()):
        own = slice(start, stop)
        part = ScanInput(*(x[own] for x in given.tensors))
        alone = ours(part, dy[own], delta=True, bounds=torch.tensor([0, stop - start]), backend="cpu")
        assert all(torch.equal(found[own], wanted) for found, wanted in zip(packed, alone, strict=True))


def test_the_number_of_threads_changes_no_bit() -> None:
    given, dy = draw((3, 6), torch.float32, widths=(33, 70))
    before, found = torch.get_num_threads(), []
    for n_threads in (1, 2, 5):
        torch.set_num_threads(n_threads)
        found.append(ours(given, dy, delta=True, backend="cpu"))
    torch.set_num_threads(before)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_one_product_are_read_where_they_lie(dtype) -> None:
    given, dy = draw((3, 6), dtype, widths=(13, 7))
    wanted = ours(given, dy, delta=True, backend="cpu")

    def spread(x):
        wide = torch.full((2 * len(x), x.shape[1] + 3, *(n + 5 for n in x.shape[2:])), float("nan"), dtype=x.dtype)
        view = wide[1::2, 2:-1, 4:-1] if x.ndim == 3 else wide[1::2, 2:-1]
        return view.copy_(x)

    def turned(x):
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    for moved in (spread, turned):
        leaves = [moved(x).detach().requires_grad_() for x in given.tensors]
        y = scan(ScanInput(*leaves), BOUNDS, delta=True, backend="cpu")
        found = [y.detach(), *torch.autograd.grad(y, leaves, moved(dy))]
        assert all(torch.equal(x, same) for x, same in zip(found, wanted, strict=True))


def test_rows_of_no_sequence_are_none(backend) -> None:
    given, _ = draw((3, 6), torch.float32)
    empty = ScanInput(*(x[:0] for x in given.tensors))
    assert scan(empty, torch.tensor([0]), delta=True, backend=backend).shape == (0, 6, 7)


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
