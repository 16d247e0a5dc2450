"""The grouped low-rank product: row by row in float64, errors at most twice those of the same rows in plain torch."""

import pytest
import torch

from bench.kernels.differentiable import grouped_low_rank, runs_of
from gradients import has_exact_gradients
from veneer.errors import ConfigError, ShapeError
from veneer.ops.dispatch import backends
from veneer.ops.dropout import Mask
from veneer.ops.grouped_low_rank import (
    AdapterRuns,
    LowRankGroup,
    Run,
    add_grouped_low_rank,
    grouped_low_rank_backward,
)

OP = "grouped_low_rank.forward"
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
SIZES = [(1, 5, 3, (1,)), (19, 29, 31, (2, 7, 1, 4)), (83, 131, 67, (16, 3, 37, 8, 33))]  # rows, i, o, ranks
OUTS = (67, 160, 1)  # of layers that share their input
LAYER_RANKS = ((17, 3, 64, 5), (1, 0, 33, 2), (0, 0, 0, 7))  # of four adapters on each; 0: none there
RUNS = AdapterRuns((Run(2, 3, 131), Run(0, 131, 132), Run(1, 140, 227), Run(0, 230, 262)), 263)  # and none of adapter 3
FEW = AdapterRuns((Run(1, 3, 67), Run(0, 67, 68), Run(2, 70, 75), Run(0, 76, 79)), 79)  # two tiles of Triton's


def draw(size, x_dtype, dtype):
    n, i, o, ranks = size
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 2 * i, generator=generator)[:, :i].to(x_dtype)  # rows further apart than they are long
    onto, dy = (torch.randn(n, o, generator=generator).to(x_dtype) for _ in range(2))
    pairs = [
        torch.randn(shape, generator=generator).to(dtype)
        for shape in [*((r, i) for r in ranks), *((o, r) for r in ranks)]
    ]
    rows = torch.randint(-1, max(1, len(ranks) - 1), (n,), generator=generator)  # nobody asks for the last of several
    return (x, onto, *pairs), [0.3 + j for j in range(len(ranks))], rows, dy


def row_by_row(leaves, scales, rows):
    x, onto, *pairs = leaves
    a, b = pairs[: len(scales)], pairs[len(scales) :]
    wide = torch.promote_types(x.dtype, a[0].dtype)
    parts = [
        (torch.zeros_like(onto[n]) if j < 0 else scales[j] * (b[j].to(wide) @ (a[j].to(wide) @ x[n].to(wide))))
        for n, j in enumerate(rows)
    ]
    return onto + torch.stack(parts).to(onto.dtype)


def grouped(backend):
    def function(leaves, scales, rows):
        x, onto, *pairs = leaves
        a, b = pairs[: len(scales)], pairs[len(scales) :]
        return grouped_low_rank(x, a, b, scales, rows, onto=onto, backend=backend)

    return function


def results(function, tensors, scales, rows, dy):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(leaves, scales, rows)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype), materialize_grads=True)]


def require_close(size, dtypes, backend):
    tensors, scales, rows, dy = draw(size, *dtypes)
    ours = results(grouped(backend), tensors, scales, rows, dy)
    rounded = [t.to(tensors[0].dtype) for t in tensors]  # a kernel may round the factors to x's dtype
    plain = results(row_by_row, rounded, scales, rows, dy)
    exact = results(row_by_row, [t.double() for t in tensors], scales, rows, dy)
    for index, (got, theirs, truth) in enumerate(zip(ours, plain, exact, strict=True)):
        allowed = 2 * (theirs.double() - truth).abs().max() + 2e-6 * truth.abs().max()
        assert got.dtype == (tensors[index - 1].dtype if index else tensors[1].dtype)
        assert (got.double() - truth).abs().max() <= allowed, index


@pytest.mark.looped("dtypes", DTYPES)
@pytest.mark.looped("size", SIZES)
def test_rows_with_their_own_adapters(size, dtypes, backend):
    require_close(size, dtypes, backend)


def test_sums_into_an_output_wider_than_the_input(backend):
    (x, onto, a, b), scales, rows, _ = draw((1, 29, 31, (5,)), torch.bfloat16, torch.float32)
    y = grouped_low_rank(x, [a], [b], scales, rows, onto=onto.float(), backend=backend)
    truth = onto.double() + (0.3 * x.double() @ a.double().T @ b.double().T if rows[0] >= 0 else 0)
    assert y.dtype == torch.float32
    assert (y - truth).abs().max() <= 1e-2 * truth.abs().max()


def test_without_onto_a_row_without_an_adapter_is_zero(backend):
    x, a, b = torch.ones(3, 5), torch.ones(2, 5), torch.ones(7, 2)
    y = grouped_low_rank(x, [a], [b], [0.5], torch.tensor([-1, 0, -1]), backend=backend)
    assert torch.equal(y, torch.tensor([0.0, 5.0, 0.0])[:, None].expand(3, 7))


def test_no_rows_at_all(backend):
    x, a, b = torch.ones(0, 5), torch.ones(2, 5, requires_grad=True), torch.ones(7, 2)
    y = grouped_low_rank(x, [a], [b], [0.5], torch.zeros(0, dtype=torch.long), backend=backend)
    y.sum().backward()
    assert y.shape == (0, 7)
    assert not a.grad.any()


def test_a_layer_on_which_no_adapter_has_a_pair(backend):
    x, a, b, rows = torch.ones(3, 5), torch.ones(1, 5), torch.ones(7, 1), AdapterRuns((Run(0, 0, 3),), 3)
    groups = [LowRankGroup((None,), (None,), (1.0,)), LowRankGroup((a,), (b,), (0.5,))]
    ys = [torch.ones(3, 4), torch.zeros(3, 7)]
    u = add_grouped_low_rank(x, groups, rows, ys, backend=backend)
    assert torch.equal(ys[0], torch.ones(3, 4))
    assert torch.equal(ys[1], torch.full((3, 7), 2.5))
    dys = [torch.ones(3, 4), torch.ones(3, 7)]
    dx, das, dbs = grouped_low_rank_backward(dys, x, u, groups, rows, backend=backend)
    assert torch.equal(dx, torch.full((3, 5), 3.5))
    assert (das[0], dbs[0]) == ((None,), (None,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacks_are_the_pairs_of_a_group_and_so_are_their_gradients(backend, dtype):
    n, r, i, o = 4, 3, 29, 31
    x, dy = torch.randn(11, i).to(dtype), torch.randn(11, o).to(dtype)
    a, b = torch.randn(n, r, i), torch.randn(o, r, n).permute(2, 0, 1)  # as PEFT keeps B of experts
    rows = AdapterRuns((Run(1, 0, 2), Run(3, 2, 7), Run(0, 8, 11)), 11)
    found = []
    for group in (LowRankGroup(a, b, (0.7,) * n), LowRankGroup(a.unbind(), b.unbind(), (0.7,) * n)):
        y = torch.ones(11, o, dtype=dtype)
        u = add_grouped_low_rank(x, [group], rows, [y], backend=backend)
        dx, [da], [db] = grouped_low_rank_backward([dy], x, u, [group], rows, backend=backend)
        found.append((y, dx, da, db))
    stacks, pairs = found
    assert torch.equal(stacks[0], pairs[0])
    assert torch.equal(stacks[1], pairs[1])
    assert torch.equal(stacks[2], torch.stack(pairs[2]))
    assert torch.equal(stacks[3], torch.stack(pairs[3]))
    assert not stacks[2][2].any()


def test_gradcheck(backend):
    tensors, scales, rows, _ = draw((4, 29, 31, (2, 3)), torch.float64, torch.float64)
    leaves = [t.requires_grad_() for t in tensors]
    assert has_exact_gradients(lambda *leaves: grouped(backend)(leaves, scales, rows), leaves)


def draw_layers(dtype, i, runs=RUNS):
    generator = torch.Generator().manual_seed(7)
    x, *dys = (torch.randn(runs.n_rows, 2 * d, generator=generator)[:, :d].to(dtype) for d in (i, *OUTS))
    ys = [torch.randn(runs.n_rows, o + 3, generator=generator).to(dtype)[:, :o] for o in OUTS]
    pairs = [
        [tuple(torch.randn(s, generator=generator) if r else None for s in ((r, i), (o, r))) for r in ranks]
        for o, ranks in zip(OUTS, LAYER_RANKS, strict=True)
    ]
    groups = [
        LowRankGroup(tuple(a for a, _ in layer), tuple(b for _, b in layer), (1.7, 0.3, 2.1, 0.9)) for layer in pairs
    ]
    return x, groups, ys, dys


def in_dtype(groups, dtype):
    to = lambda factors: tuple(None if f is None else f.to(dtype, copy=True) for f in factors)  # noqa: E731
    return [LowRankGroup(to(g.a), to(g.b), g.scales, g.masks) for g in groups]


def with_masks(groups, runs=RUNS):
    """Of two layers all adapters, of one none; one adapter's drops all."""
    ids = torch.randint(-(2**63), 2**63 - 1, (runs.n_rows,), generator=torch.Generator().manual_seed(11))
    masks = (Mask(0.3, 2**63 + 17, ids), None, Mask(0.6, 41, ids), None)
    of_layer = masks, (), (*masks[1:], Mask(1.0, 5, ids))
    return [LowRankGroup(g.a, g.b, g.scales, own) for g, own in zip(groups, of_layer, strict=True)]


def layers_by_run(x, groups, ys, runs):
    """The formula, run by run, under autograd."""
    parts = []
    for y, group in zip(ys, groups, strict=True):
        total = y.clone()
        for k, start, stop in runs.runs:
            if group.a[k] is not None:
                own = x[start:stop]
                if group.mask_of(k) is not None:
                    own = own * group.masks[k].drop(torch.ones_like(own), slice(start, stop), backend="reference")
                total[start:stop] += group.scales[k] * ((own @ group.a[k].T) @ group.b[k].T)
        parts.append(total)
    return parts


def layer_gradients(x, groups, ys, dys, runs):
    x = x.detach().requires_grad_()
    factors = [f.requires_grad_() for g in groups for f in (*g.a, *g.b) if f is not None]
    outs = layers_by_run(x, groups, ys, runs)
    used = [(y, dy) for y, dy in zip(outs, dys, strict=True) if y.requires_grad]  # nobody's rows reach the last layer
    grads = torch.autograd.grad([y for y, _ in used], [x, *factors], [dy for _, dy in used], materialize_grads=True)
    return [*(y.detach() for y in outs), *grads]


@pytest.mark.looped("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.looped("odd", [False, True])
@pytest.mark.looped("masked", [False, True])
def test_layers_that_share_their_input(dtype, odd, masked, backend):
    runs, i = RUNS, 77 if odd else 96
    if backend == "triton":  # its interpreter is slow: two tiles of rows, and of columns a whole one and a part
        runs = FEW
    elif masked:
        i += 64 if odd else 96
    x, groups, ys, dys = draw_layers(dtype, i, runs)
    groups = with_masks(groups, runs) if masked else groups
    double = [[t.double() for t in tensors] for tensors in (ys, dys)]
    exact = layer_gradients(x.double(), in_dtype(groups, torch.float64), *double, runs)
    plain = layer_gradients(x, in_dtype(groups, dtype), ys, dys, runs)
    outs = [torch.empty(runs.n_rows, 2 * y.shape[1], dtype=dtype)[:, : y.shape[1]].copy_(y) for y in ys]
    u = add_grouped_low_rank(x, groups, runs, outs, backend=backend)
    dx, das, dbs = grouped_low_rank_backward(dys, x, u, groups, runs, backend=backend)
    pairs = zip(das, dbs, strict=True)
    ours = [*outs, dx, *(f for layer in pairs for factors in layer for f in factors if f is not None)]
    for index, (got, theirs, truth) in enumerate(zip(ours, plain, exact, strict=True)):
        allowed = 2 * (theirs.double() - truth).abs().max() + 2e-6 * truth.abs().max()
        assert (got.double() - truth).abs().max() <= allowed, index
    nobodys = slice(runs.runs[1].stop, runs.runs[2].start)
    assert torch.equal(outs[0][nobodys], ys[0][nobodys])
    assert not dx[nobodys].any()
    assert not das[0][3].any()  # an adapter without rows
    assert not dbs[2][3].any()
    without = grouped_low_rank_backward(dys, x, u, groups, runs, input_grad=False, backend=backend)
    assert without[0] is None
    assert torch.equal(without[1][0][2], das[0][2])


def test_rows_of_an_adapter_without_pairs_here_have_no_gradient(backend):
    x, a, b = torch.ones(70, 5), torch.ones(2, 5), torch.ones(7, 2)
    group, rows = LowRankGroup((None, a), (None, b), (1.0, 0.5)), AdapterRuns((Run(0, 0, 3), Run(1, 3, 70)), 70)
    y = torch.zeros(70, 7)
    u = add_grouped_low_rank(x, [group], rows, [y], backend=backend)
    dx, _, _ = grouped_low_rank_backward([torch.ones(70, 7)], x, u, [group], rows, backend=backend)
    assert torch.equal(dx, torch.tensor([0.0] * 3 + [7.0] * 67)[:, None].expand(70, 5))
    assert torch.equal(y, torch.tensor([0.0] * 3 + [5.0] * 67)[:, None].expand(70, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_on_all_rows_of_one_adapter(dtype, backend):
    """Whole blocks of rows, in place: the form that a training step has."""
    generator = torch.Generator().manual_seed(13)
    n = 16 if backend == "triton" else 192  # a tile of Triton's
    i, outs, rank, ids = 128, (64, 96), 16, torch.arange(n) + 2**32 - 7
    x, *dys = (torch.randn(n, d, generator=generator).to(dtype) for d in (i, *outs))
    pairs = [[torch.randn(s, generator=generator) for s in ((rank, i), (o, rank))] for o in outs]
    masks = [Mask(0.25, 3 + 2**40 * layer, ids) for layer in range(2)]
    groups = [LowRankGroup((a,), (b,), (0.7,), (mask,)) for (a, b), mask in zip(pairs, masks, strict=True)]
    rows, ys = AdapterRuns((Run(0, 0, n),), n), [torch.zeros(n, o, dtype=dtype) for o in outs]
    u = add_grouped_low_rank(x, groups, rows, ys, backend=backend)
    dx, das, dbs = grouped_low_rank_backward(dys, x, u, groups, rows, backend=backend)
    wide, total = x.double().requires_grad_(), 0
    for y, dy, (a, b), mask, da, db in zip(ys, dys, pairs, masks, das, dbs, strict=True):
        kept = mask.drop(torch.ones(n, i, dtype=torch.float64), backend="reference")
        leaves = [wide, *(t.double().requires_grad_() for t in (a, b))]
        truth = 0.7 * ((wide * kept) @ leaves[1].T @ leaves[2].T)
        grads = torch.autograd.grad(truth, leaves, dy.double())
        total = total + grads[0]
        for got, wanted in ((y, truth), (da[0], grads[1]), (db[0], grads[2])):
            assert (got - wanted).abs().max() <= (2e-6 if dtype == torch.float32 else 0.012) * wanted.abs().max()
    assert (dx - total).abs().max() <= (2e-6 if dtype == torch.float32 else 0.012) * total.abs().max()


@pytest.mark.parametrize("masked", [False, True])
def test_one_adapter_on_many_layers(masked, backend):
    """Six layers of different ranks. One has no mask, one drops all, and two have ids of their own."""
    generator = torch.Generator().manual_seed(17)
    n, i, ranks, ids = 19, 77, (3, 1, 5, 2, 5, 4), torch.arange(19) * 5 + 2**32 - 7
    outs, p = [11 + 2 * rank for rank in ranks], (0.25, 0.6, 0.0, 1.0, 0.3, 0.5)
    x, *dys = (torch.randn(n, d, generator=generator) for d in (i, *outs))
    pairs = [[torch.randn(s, generator=generator) for s in ((r, i), (o, r))] for r, o in zip(ranks, outs, strict=True)]
    masks = [Mask(p[k], 3 + 2**40 * k, ids if k < 4 else ids + 1) if p[k] else None for k in range(6)]
    own = [(mask,) if masked else () for mask in masks]
    groups = [LowRankGroup((a,), (b,), (0.7 + k,), own[k]) for k, (a, b) in enumerate(pairs)]
    rows, ys = AdapterRuns((Run(0, 0, n),), n), [torch.ones(n, o) for o in outs]
    exact = layer_gradients(x.double(), in_dtype(groups, torch.float64), [y.double() for y in ys], dys, rows)
    u = add_grouped_low_rank(x, groups, rows, ys, backend=backend)
    dx, das, dbs = grouped_low_rank_backward(dys, x, u, groups, rows, backend=backend)
    ours = [*ys, dx, *(f for da, db in zip(das, dbs, strict=True) for f in (*da, *db))]
    for index, (got, truth) in enumerate(zip(ours, exact, strict=True)):
        assert got.shape == truth.shape
        assert (got - truth).abs().max() <= 3e-6 * truth.abs().max(), index
    assert grouped_low_rank_backward(dys, x, u, groups, rows, input_grad=False, backend=backend)[0] is None


@pytest.mark.skipif("cpu" not in backends(OP), reason="the C++ module was not built")
@pytest.mark.parametrize("masked", [False, True])
def test_the_number_of_threads_changes_no_bit(masked):
    x, groups, ys, dys = draw_layers(torch.bfloat16, 96)
    groups = with_masks(groups) if masked else groups
    found, before = [], torch.get_num_threads()
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            outs = [y.clone() for y in ys]
            u = add_grouped_low_rank(x, groups, RUNS, outs, backend="cpu")
            dx, das, dbs = grouped_low_rank_backward(dys, x, u, groups, RUNS, backend="cpu")
            found.append([*outs, dx, *(f for layer in (*das, *dbs) for f in layer if f is not None)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


def test_runs_of_rows_are_found():
    runs = runs_of(torch.tensor([-1, 2, 2, 0, -1, -1, 2]))
    assert runs == AdapterRuns((Run(2, 1, 3), Run(0, 3, 4), Run(2, 6, 7)), 7)
    assert runs.times(3).runs[1] == Run(0, 9, 12)
    assert runs.row_to_adapter(torch.device("cpu")).tolist() == [-1, 2, 2, 0, -1, -1, 2]


@pytest.mark.usefixtures("own_checks")
def test_a_mask_that_does_not_fit():
    x, a, b, rows = torch.zeros(3, 5), torch.zeros(2, 5), torch.zeros(7, 2), torch.zeros(3, dtype=torch.long)
    for mask, error, message in (
        (Mask(0.1, 3, rows[:2]), ShapeError, r"rows must be \(3,\)"),
        (Mask(0.1, -3, rows), ConfigError, "given -3"),
    ):
        with pytest.raises(error, match=message):
            add_grouped_low_rank(
                x, [LowRankGroup((a,), (b,), (1.0,), (mask,))], AdapterRuns((), 3), [torch.zeros(3, 7)]
            )
