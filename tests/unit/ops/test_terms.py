"""Packed terms: each kind is the term's own matrix, a row does not depend on the others, and blocks work in place."""

from dataclasses import replace

import pytest
import torch

from veneer.errors import ShapeError
from veneer.methods.c3a import Circulant
from veneer.methods.lokr import Kronecker
from veneer.methods.road import PairRotation
from veneer.ops.packed import PackedWeight
from veneer.ops.reference.terms import dense
from veneer.ops.terms import PackedTerm, apply_term, times_weight
from veneer.quant.dense import DenseWeight
from veneer.records.terms.base import Base
from veneer.records.terms.hadamard import Hadamard
from veneer.records.terms.rotation import BlockRotation
from veneer.records.terms.sparse import Sparse

OP = "terms.apply"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def sparse(o, i, n):
    places = torch.randperm(o * i, generator=torch.Generator().manual_seed(o))[:n]
    return Sparse(values=drawn(n), places=places, size=(o, i))


def matrix(term):
    return term.apply(torch.eye(term.width)).T if hasattr(term, "width") else term.dense(torch.float32)


TERMS = {
    "blocks of 32": BlockRotation(drawn(5, 32, 32)),
    "blocks of 7": BlockRotation(drawn(9, 7, 7)),
    "pairs": PairRotation(drawn(60), drawn(60, seed=1), 20),
    "sparse": sparse(37, 53, 300),
    "sparse, empty rows": sparse(41, 11, 6),
    "kronecker": Kronecker(w1=drawn(5, 7), w2=drawn(24, 19)),
    "kronecker of ones": Kronecker(w1=drawn(1, 1), w2=drawn(3, 17)),
    "circulant": Circulant(kernel=drawn(3, 2, 32), scale=0.7),
    "circulant of 13": Circulant(kernel=drawn(2, 5, 13), scale=-1.3),
    "weighed": Circulant(kernel=drawn(2, 3, 6), scale=0.5).weighed(-0.25),
}


@pytest.mark.parametrize("name", TERMS)
def test_a_packed_term_is_the_matrix(name):
    term = TERMS[name]
    torch.testing.assert_close(dense(PackedTerm.pack(term.form())), matrix(term), rtol=1e-6, atol=1e-6)


@pytest.mark.looped("add", [True, False])
@pytest.mark.looped("dtype", DTYPES)
@pytest.mark.looped("name", TERMS)
def test_rows_are_mapped(name, dtype, add, backend):
    exact, packed = matrix(TERMS[name]).double(), PackedTerm.pack(TERMS[name].form())
    x, y = drawn(6, exact.shape[1]).to(dtype), drawn(6, exact.shape[0], seed=2).to(dtype)
    expected = x.double() @ exact.T + (y.double() if add else 0)
    size = x.double().abs() @ exact.abs().T + y.double().abs()
    apply_term(packed, x, y, add=add, backend=backend)
    assert ((y.double() - expected).abs() <= 2e-6 * size + torch.finfo(dtype).eps * expected.abs()).all()


@pytest.mark.looped("n", [2, 3, 70])
@pytest.mark.looped("name", TERMS)
def test_a_row_does_not_depend_on_the_others(name, n):
    packed = PackedTerm.pack(TERMS[name].form())
    o, i = packed.shape
    x, together = drawn(n, i).bfloat16(), torch.zeros(n, o, dtype=torch.bfloat16)
    apply_term(packed, x, together, add=True)
    for row in range(n):
        alone = torch.zeros(1, o, dtype=torch.bfloat16)
        apply_term(packed, x[row : row + 1], alone, add=True)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("name", ["blocks of 32", "blocks of 7", "pairs"])
def test_blocks_work_in_place_between_other_columns(name, backend):
    packed = PackedTerm.pack(TERMS[name].form())
    d = packed.shape[0]
    wide = drawn(65, d + 11)
    x = wide[:, 5 : 5 + d]
    expected, beside = x @ dense(packed).T, wide[:, 5 + d :].clone()
    apply_term(packed, x, x, add=False, backend=backend)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(wide[:, 5 + d :], beside)


def test_rows_of_another_size_or_dtype_are_refused():
    packed = PackedTerm.pack(TERMS["kronecker"].form())
    x, y = torch.ones(2, 133), torch.ones(2, 120)
    for given in ((x[:, :5], y), (x, y[:, :5]), (x.bfloat16(), y)):
        with pytest.raises(ShapeError, match="maps rows of 133 values to rows of 120 in the same dtype"):
            apply_term(packed, *given, add=True)


@pytest.mark.parametrize("name", TERMS)
def test_what_is_packed_is_sound(name):
    assert PackedTerm.pack(TERMS[name].form()).is_sound


def damaged():
    """Terms as a damaged file may say them."""
    circulant, scattered = (PackedTerm.pack(TERMS[name].form()) for name in ("circulant", "sparse"))
    o, i = scattered.sizes

    def with_index(place, number):
        index = scattered.index.clone()
        index[place] = number
        return replace(scattered, index=index)

    yield replace(circulant, kind="other")
    yield replace(circulant, values=circulant.values.half())
    yield replace(scattered, index=scattered.index.long())
    yield replace(scattered, values=scattered.values[:, None])
    yield replace(circulant, kind="blocks")
    yield replace(circulant, sizes=(3, 3, 32))
    yield replace(circulant, sizes=(3, -2, -32))
    yield replace(circulant, index=scattered.index)
    yield replace(scattered, index=None)
    yield replace(scattered, values=scattered.values[1:])
    yield replace(scattered, sizes=(o + 1, i))
    yield from (with_index(0, 1), with_index(3, -1), with_index(o, 10**6), with_index(o + 5, i), with_index(o + 5, -1))


@pytest.mark.parametrize("term", list(damaged()))
def test_what_would_leave_its_memory_is_not_sound(term):
    assert not term.is_sound


@pytest.mark.looped("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.looped(("o", "i", "r"), [(1, 1, 1), (77, 53, 5), (129, 96, 16), (64, 31, 3)])
def test_a_weight_is_multiplied_entry_by_entry(o, i, r, dtype, backend):
    weight, a, b = drawn(o, i).to(dtype), drawn(r, i, seed=1), drawn(o, r, seed=2)
    term = PackedTerm.pack(Hadamard(a=a, b=b, base=Base(DenseWeight(weight))).form())
    made = times_weight(term, PackedWeight.pack(weight), backend=backend)
    unrounded, plain = weight.double() * (b.double() @ a.double()), weight * (b.to(dtype) @ a.to(dtype))
    error, plain_error = (abs(each.double() - unrounded).max() for each in (made.dense(), plain))
    assert error <= 2 * plain_error + 1e-6 * unrounded.abs().max()
    if dtype == torch.bfloat16:
        a, b = a.bfloat16(), b.bfloat16()
    exact = weight.double() * (b.double() @ a.double())
    size = weight.double().abs() * (b.double().abs() @ a.double().abs())
    assert ((made.dense().double() - exact).abs() <= 1e-6 * size + torch.finfo(dtype).eps * exact.abs()).all()
    assert torch.equal(PackedWeight.pack(made.dense()).panels, made.panels)  # zeros beyond the weight
    assert term.is_sound


def test_a_weight_of_another_shape_is_refused():
    term = PackedTerm.pack(Hadamard(a=drawn(2, 5), b=drawn(7, 2), base=Base(DenseWeight(drawn(7, 5)))).form())
    with pytest.raises(ShapeError, match="multiplies a weight of its own shape"):
        times_weight(term, PackedWeight.pack(drawn(5, 7)))
