"""The grouped low-rank product: row by row in float64, errors at most twice those of the same rows in plain torch."""

import pytest
import torch

from veneer.errors import ShapeError
from veneer.ops.grouped_low_rank import grouped_low_rank

OP = "grouped_low_rank.forward"
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
SIZES = [(1, 5, 3, (1,)), (19, 29, 31, (2, 7, 1, 4)), (83, 131, 67, (16, 3, 37, 8, 33))]  # rows, i, o, ranks


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


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("size", SIZES)
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


def test_gradcheck(backend):
    tensors, scales, rows, _ = draw((4, 29, 31, (2, 3)), torch.float64, torch.float64)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda *leaves: grouped(backend)(leaves, scales, rows), leaves)


@pytest.mark.usefixtures("own_checks")
def test_group_that_does_not_fit():
    x, a, b, rows = torch.zeros(3, 5), torch.zeros(2, 5), torch.zeros(7, 2), torch.zeros(3, dtype=torch.long)
    for args, message in (
        (([], [], [], rows), "at least one adapter"),
        (([a], [b, b], [1.0], rows), "given 1, 2 and 1"),
        (([a, a[:1]], [b, b], [1.0, 2.0], rows), "adapter 1"),
        (([a], [b], [1.0], rows[:2]), "row_to_adapter"),
        (([a], [b], [1.0], rows + 1), "above the 1 adapters"),
    ):
        with pytest.raises(ShapeError, match=message):
            grouped_low_rank(x, *args)
    with pytest.raises(ShapeError, match=r"onto is \(3, 6\)"):
        grouped_low_rank(x, [a], [b], [1.0], rows, onto=torch.zeros(3, 6))
