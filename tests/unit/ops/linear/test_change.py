"""Changes of every method: made as one matrix or multiplied by their own product, and in 16 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veneer.methods.c3a import Circulant
from veneer.methods.fourierft import FourierChange
from veneer.methods.frod import InBasis
from veneer.methods.lily import SequenceMixture
from veneer.methods.lokr import Kronecker
from veneer.methods.osf import Triplets
from veneer.methods.randlora import Draw, RandomBases, bases
from veneer.methods.waveft import Coefficients, padded
from veneer.ops.linear.change import add_changes, changes_backward
from veneer.ops.linear.layer import MANY_ROWS, LinearLayer
from veneer.quant.dense import DenseWeight
from veneer.records.deltas import LinearDelta
from veneer.records.terms.base import Base
from veneer.records.terms.change import Change
from veneer.records.terms.hadamard import Hadamard
from veneer.records.terms.sparse import Sparse

OUT, IN = 21, 15
ROWS = MANY_ROWS + 3  # and at least as many as the smaller width: some changes are made then
FEW = 4


def drawn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def places(n: int, o: int = OUT, i: int = IN) -> dict[str, Tensor]:
    found = torch.randperm(o * i, generator=torch.Generator().manual_seed(5))[:n]
    return {"rows": found // i, "columns": found % i}


def flat(n: int) -> Tensor:
    found = places(n)
    return found["rows"] * IN + found["columns"]


def triplets() -> Triplets:
    u, s, v = drawn(OUT, 6), drawn(6).abs(), drawn(6, IN)
    moved = {"u": u + 1e-3 * drawn(OUT, 6, seed=7), "s": s + 1e-3, "v": v + 1e-3 * drawn(6, IN, seed=8)}
    return Triplets(**moved, u_start=u, s_start=s, v_start=v)


BASES = bases(Draw(seed=11, r=4, small=IN, large=OUT))
CHANGES = {
    "Kronecker": lambda: Kronecker(w1=drawn(3, 5), w2=drawn(7, 3)),
    "Kronecker by rows": lambda: Kronecker(w1=drawn(OUT, 1), w2=drawn(1, IN)),  # a kernel maps many rows by its form
    "circulant": lambda: Circulant(kernel=drawn(7, 5, 3), scale=0.3),
    "sparse": lambda: Sparse(values=drawn(31), places=flat(31), size=(OUT, IN)),
    "spectrum": lambda: FourierChange(values=drawn(31), **places(31), size=(OUT, IN), scaling=3.0),
    "coefficients": lambda: Coefficients(
        values=drawn(31),
        **places(31, padded(OUT, "db2"), padded(IN, "db2")),
        size=(OUT, IN),
        scaling=0.7,
        wavelet="db2",
    ),
    "Hadamard": lambda: Hadamard(a=drawn(3, IN), b=drawn(OUT, 3), base=Base(DenseWeight(drawn(OUT, IN, seed=9)))),
    "random bases": lambda: RandomBases(
        scales=drawn(4, 4), columns=drawn(4, IN), bases=BASES, large=OUT, scale=0.1, is_turned=False
    ),
    "in a basis": lambda: InBasis(
        diagonal=drawn(IN), values=drawn(9), **places(9, IN, IN), u=drawn(OUT, IN), v=drawn(IN, IN, seed=4)
    ),
    "triplets": triplets,
    "weighed": lambda: Sparse(values=drawn(31), places=flat(31), size=(OUT, IN)).weighed(0.7),
    "transposed": lambda: Kronecker(w1=drawn(5, 3), w2=drawn(3, 7)).transposed(),
}


def change(name: str, dtype: torch.dtype = torch.float64) -> Change:
    made = CHANGES[name]()
    return made.with_tensors([x.to(dtype).requires_grad_() if x.is_floating_point() else x for x in made.tensors])


def by_op(term: Change, x: Tensor, dy: Tensor) -> list[Tensor]:
    layer = LinearLayer(weight=torch.zeros(OUT, IN), records=(LinearDelta(adds=(term,)),))
    with torch.no_grad():
        z = torch.zeros(len(x), OUT, dtype=x.dtype)
        add_changes(z, x, layer)
        dx, [[gradients]] = changes_backward(dy, dy, x, layer, None, True)
    return [z, dx, *(g for g in gradients if g is not None)]


def by_formula(term: Change, x: Tensor, dy: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = leaf @ term.dense(x.dtype).T
    leaves = [leaf, *(t for t in term.tensors if t.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.looped("n_rows", [FEW, ROWS])
@pytest.mark.looped("name", CHANGES)
def test_the_products_and_gradients_are_those_of_the_matrix(name: str, n_rows: int) -> None:
    term, x, dy = change(name), drawn(n_rows, IN, seed=5), drawn(n_rows, OUT, seed=6)
    for got, wanted in zip(by_op(term, x, dy), by_formula(term, x, dy), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.looped("n_rows", [FEW, ROWS])
@pytest.mark.looped("name", CHANGES)
def test_16_bits_round_a_change_and_not_its_difference_from_large_numbers(name: str, n_rows: int) -> None:
    """Triplets differ by 0.1% from their start, which 16 bits do not tell."""
    term, x, dy = change(name, torch.float32), drawn(n_rows, IN, seed=5), drawn(n_rows, OUT, seed=6)
    exact = by_formula(change(name), x.bfloat16().double(), dy.bfloat16().double())
    x, dy = x.bfloat16(), dy.bfloat16()
    for got, plain, wanted in zip(by_op(term, x, dy), by_formula(term, x, dy), exact, strict=True):
        assert (got.double() - wanted).norm() <= 2 * (plain.double() - wanted).norm() + 1e-6 * wanted.norm()


@pytest.mark.parametrize("name", CHANGES)
def test_rows_that_are_served_go_through_the_product_of_few(name: str) -> None:
    term, x = change(name, torch.float32), drawn(ROWS, IN, seed=5).bfloat16()
    layer = LinearLayer(weight=torch.zeros(OUT, IN), records=(LinearDelta(adds=(term,)),), rows_alone=True)
    with torch.no_grad():
        z = torch.zeros(len(x), OUT, dtype=x.dtype)
        add_changes(z, x, layer)
        assert torch.equal(z, torch.zeros_like(z).add_(term.apply(x)))


def test_only_changes_with_a_product_of_their_own_use_it() -> None:
    asked = {name: [change(name).is_made_for(n, torch.float32) for n in (FEW, ROWS)] for name in CHANGES}
    own, made, by_rows = [False, False], [True, True], [False, True]
    assert asked == {
        "Kronecker": own, "Kronecker by rows": own, "circulant": by_rows, "sparse": made, "spectrum": by_rows,
        "coefficients": by_rows,
        "Hadamard": made, "random bases": by_rows, "in a basis": by_rows, "triplets": by_rows, "weighed": made,
        "transposed": own,
    }  # fmt: skip


def test_nothing_is_asked_of_a_change_that_is_not_trained() -> None:
    frozen = change("sparse").with_tensors([x.detach() for x in change("sparse").tensors])
    layer = LinearLayer(weight=torch.zeros(OUT, IN), records=(LinearDelta(adds=(frozen,)),))
    dy = drawn(ROWS, OUT)
    dx, [[gradients]] = changes_backward(dy, dy, drawn(ROWS, IN), layer, None, False)
    assert dx is None
    assert gradients == (None, None)


@pytest.mark.looped("n_rows", [FEW, ROWS])
@pytest.mark.looped("name", CHANGES)
def test_the_gradient_in_x_is_added_with_that_of_the_weight(name: str, n_rows: int) -> None:
    term, x, dy, weight = change(name), drawn(n_rows, IN, seed=5), drawn(n_rows, OUT, seed=6), drawn(OUT, IN, seed=2)
    layer = LinearLayer(weight=weight, records=(LinearDelta(adds=(term,)),))
    dx, _ = changes_backward(dy, dy, x, layer, drawn(n_rows, IN, seed=1), True)
    torch.testing.assert_close(dx, drawn(n_rows, IN, seed=1) + dy @ (weight + term.dense().detach()))


@pytest.mark.parametrize("name", ["Kronecker", "circulant"])
def test_written_gradients_are_those_of_differences(name: str) -> None:
    term = change(name)
    torch.autograd.gradcheck(lambda *tensors: term.with_tensors(tensors).dense(), term.tensors)


def test_a_kronecker_product_is_made_where_a_matrix_unit_gains_more_than_it_saves() -> None:
    for width, is_made in ((24, True), (64, False)):
        term = Kronecker(w1=torch.empty(width, width), w2=torch.empty(width, width))
        assert term.is_made_for(width**2, torch.bfloat16) == is_made
        assert not term.is_made_for(width**2 - 1, torch.bfloat16)
        assert not term.is_made_for(width**2, torch.float32)


@pytest.mark.parametrize("trained", [("a", "router", "b"), ("router",), ("a",), ("b",)])
@pytest.mark.parametrize("n_rows", [FEW, ROWS])
def test_a_mixture_is_its_own_product_and_gradients_are_those_of_autograd(
    n_rows: int, trained: tuple[str, ...]
) -> None:
    members = torch.zeros(n_rows, 3, dtype=torch.float64)
    members[: n_rows // 2, 0] = members[n_rows // 2 : -1, 2] = 1  # two sequences, and a token of none
    made = {"a": drawn(4, IN), "router": drawn(2, 4, seed=2), "b": drawn(8, OUT)}
    made = {name: value.requires_grad_(name in trained) for name, value in made.items()}
    term, x, dy = SequenceMixture(**made, scale=0.7, members=members), drawn(n_rows, IN, seed=5), drawn(n_rows, OUT)
    leaf = x.clone().requires_grad_()
    y = term.matmul(leaf)
    wanted = [y.detach(), *torch.autograd.grad(y, [leaf, *(made[name] for name in trained)], dy)]
    for got, exact in zip(by_op(term, x, dy), wanted, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9)
