"""Products of kernels: those of the matrices that their forms and pairs stand for, in either pass."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from veneer.ops.grouped_low_rank import AdapterRuns, LowRankGroup, Run, add_grouped_low_rank, grouped_low_rank_backward
from veneer.ops.linear.forms import entries, entry_gradients, form_gradients, map_rows, shape_of
from veneer.ops.state.scan import ScanInput, scan
from veneer.ops.traced import tracing
from veneer.plan.products import MatrixProduct
from veneer.plan.work import CountWork
from veneer.quant.dense import DenseWeight
from veneer.records.terms.base import Base
from veneer.records.terms.form import Form

N = 67
BLOCKS = Form("blocks", (5, 32), torch.ones(5, 32, 32))
SPARSE = Form("sparse", (37, 53), torch.ones(299), places=torch.arange(299))
KRONECKER = Form("kronecker", (5, 7, 24, 19), torch.ones(5, 7), torch.ones(24, 19))
FORMS = {
    "blocks": (BLOCKS, [MatrixProduct(N, 32, 32, "float32", 5)], 1),
    "sparse": (SPARSE, [MatrixProduct(N, 8, 37, "float32")], 1),  # 299 values of 37 outputs
    "kronecker": (KRONECKER, [MatrixProduct(7 * N, 19, 24, "float32"), MatrixProduct(24 * N, 7, 5, "float32")], 2),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", FORMS)
def test_forms_count_as_products_in_float32(kind: str, transposed: bool) -> None:
    form, products, n_factors = FORMS[kind]
    o, i = shape_of(form)
    counted = CountWork()
    counted.on = True
    with tracing(counted.kernel):
        x, dy = torch.ones(N, i, dtype=torch.bfloat16), torch.ones(N, o, dtype=torch.bfloat16)
        map_rows(form, *((dy, x) if transposed else (x, dy)), add=True, transposed=transposed, backend="cpu")
    assert counted.passes[0].products == Counter(products)
    counted = CountWork()
    counted.on = True
    with tracing(counted.kernel):
        form_gradients(form, dy, x, backend="cpu")
    assert counted.passes[0].products == Counter(products * n_factors)


def test_a_matrix_of_a_form_counts_as_the_product_of_its_factors() -> None:
    base, factors = Base(DenseWeight(torch.ones(37, 53))), (torch.ones(5, 53), torch.ones(37, 5))
    form, counted = Form("hadamard", (37, 53, 5), *factors, base=base), CountWork()
    counted.on = True
    with tracing(counted.kernel):
        entries(form, torch.float32, backend="cpu")
        entry_gradients(form, torch.ones(37, 53), backend="cpu")
    assert counted.passes[0].products == {MatrixProduct(37, 5, 53, "float32"): 3}


def test_pairs_count_by_the_runs_that_take_them() -> None:
    counted = CountWork()
    counted.on = True
    rows = AdapterRuns((Run(0, 0, 11), Run(1, 11, 16), Run(2, 16, 19)), 23)  # four rows have no adapter
    with tracing(counted.kernel):
        x, ys = torch.ones(23, 29), [torch.ones(23, o) for o in (31, 17)]
        groups = [
            LowRankGroup(
                tuple(torch.ones(r, 29) if r else None for r in ranks),
                tuple(torch.ones(o, r) if r else None for r in ranks),
                (1.0, 1.0, 1.0),
            )
            for o, ranks in ((31, (5, 0, 0)), (17, (2, 3, 0)))
        ]
        u = add_grouped_low_rank(x, groups, rows, ys, backend="cpu")
    forward = [
        MatrixProduct(11, 29, 7, "float32"), MatrixProduct(11, 5, 31, "float32"), MatrixProduct(11, 2, 17, "float32"),
        MatrixProduct(5, 29, 3, "float32"), MatrixProduct(5, 3, 17, "float32"),
    ]  # fmt: skip
    assert counted.passes[0].products == Counter(forward)
    counted = CountWork()
    counted.on = True
    with tracing(counted.kernel):
        grouped_low_rank_backward(ys, x, u, groups, rows, backend="cpu")
    products = counted.passes[0].products
    assert sum(p.flops * n for p, n in products.items()) == 2 * sum(p.flops for p in forward)


def test_a_scan_counts_as_products_with_the_states() -> None:
    counted = CountWork()
    counted.on = True
    with tracing(counted.kernel):
        q, k = (torch.ones(N, 2, 13).requires_grad_() for _ in range(2))
        v, gates = torch.ones(N, 6, 7), torch.ones(N, 6)
        y = scan(ScanInput(q, k, v, -gates, gates), torch.tensor([0, 5, N]), delta=True, backend="cpu")
        y.sum().backward()
    products = [MatrixProduct(N, 13, times * 7, "float32", 6) for times in (4, 10)]
    assert counted.passes[0].products == Counter(products)
