"""The nearest update of a rank against an SVD in float64, for tall, wide and deficient matrices."""

from __future__ import annotations

import pytest
import torch

from veneer.combine.leading import leading
from veneer.combine.plain import plain_of, plain_within
from veneer.combine.truncate import rank_within, truncate_dense
from veneer.combine.update import Update
from veneer.errors import CompositionError
from veneer.quant.dense import DenseWeight
from veneer.records.deltas import LinearDelta
from veneer.records.terms.scale import Scale


@pytest.mark.parametrize("shape", [(37, 19), (19, 37), (23, 23)])
@pytest.mark.parametrize("decay", [0.9, 0.1])  # at 0.1 the last values are far below the precision of the first
def test_factors_are_those_of_an_svd(shape: tuple[int, int], decay: float) -> None:
    torch.manual_seed(5)
    u, _ = torch.linalg.qr(torch.randn(shape[0], 19, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(shape[1], 19, dtype=torch.float64))
    values = 3.0 * decay ** torch.arange(19)
    record, error = truncate_dense((u * values @ v.T).float(), 7)
    pair = record.low_rank
    assert pair is not None
    torch.testing.assert_close(pair.b @ pair.a, (u[:, :7] * values[:7] @ v[:, :7].T).float(), rtol=1e-4, atol=3e-6)
    torch.testing.assert_close(pair.b[:, :3].norm(dim=0), values[:3].float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(pair.a[:3] @ pair.a[:3].T, torch.eye(3), rtol=0, atol=1e-4)
    lost = float(values[7:].norm() / values.norm())
    assert error == pytest.approx(lost, rel=1e-2, abs=3e-7)
    if decay == 0.9:
        assert [rank_within((u * values @ v.T).float(), lost * share) for share in (1.01, 0.99)] == [7, 8]


@pytest.mark.parametrize("shape", [(1031, 1057), (1057, 1031)])
@pytest.mark.parametrize("decay", [0.97, 0.3])
def test_leading_vectors_of_a_large_update_are_those_of_the_whole(shape: tuple[int, int], decay: float) -> None:
    torch.manual_seed(5)
    update = torch.randn(shape) * decay ** torch.arange(shape[1])
    tall = (update.T if shape[0] < shape[1] else update).double()
    energy, vectors = torch.linalg.eigh(tall.T @ tall)
    wanted = vectors[:, -7:].flip(1)
    found = leading(tall, 7)
    assert found is not None
    torch.testing.assert_close(found[0], energy[-7:].flip(0), rtol=1e-9, atol=0)
    torch.testing.assert_close((found[1] * wanted).sum(0).abs(), torch.ones(7, dtype=torch.float64), rtol=1e-6, atol=0)
    record, error = truncate_dense(update, 7)
    pair = record.low_rank
    assert pair is not None
    near = tall @ wanted @ wanted.T
    torch.testing.assert_close((pair.b @ pair.a).double(), near.T if shape[0] < shape[1] else near, rtol=0, atol=2e-5)
    assert error == pytest.approx(float((1 - energy[-7:].sum() / energy.sum()) ** 0.5), rel=1e-6)


def test_a_spectrum_without_a_gap_is_decomposed_whole() -> None:
    torch.manual_seed(5)
    flat = torch.randn(1033, 1033, dtype=torch.float64)
    assert leading(flat, 31) is None
    record, error = truncate_dense(flat, 31)
    s = torch.linalg.svdvals(flat)
    assert record.rank == 31
    assert error == pytest.approx(float(s[31:].norm() / s.norm()), rel=1e-9)


def test_an_exact_low_rank_update_is_found_in_a_space_of_its_rank() -> None:
    torch.manual_seed(5)
    b, a = torch.randn(1031, 5, dtype=torch.float64), torch.randn(5, 1051, dtype=torch.float64)
    record, error = truncate_dense(b @ a, 7)
    pair = record.low_rank
    assert pair is not None
    torch.testing.assert_close(pair.b @ pair.a, b @ a, rtol=0, atol=1e-9)
    assert error < 3e-7


@pytest.mark.parametrize("error", [0.3, 1e-3, 0.0])
def test_factors_within_an_error_have_the_smallest_rank(error: float) -> None:
    torch.manual_seed(5)
    weight = torch.randn(11, 17)
    scaled = Update(LinearDelta(output=Scale(1 + 0.7 ** torch.arange(11.0))), DenseWeight(weight))
    pair = Update(LinearDelta.pair(torch.randn(5, 17), torch.randn(11, 5) * 0.3 ** torch.arange(5.0)))
    for update in (scaled, pair):
        s = torch.linalg.svdvals(update.dense().double())
        rank = min(r for r in range(1, 12) if float(s[r:].norm() / s.norm()) <= max(error, 1e-6))
        found = plain_within(update, error)
        assert found.rank == rank
        lost = (found.b @ found.a - update.dense()).double().norm() / s.norm()
        assert found.error == pytest.approx(float(lost), rel=1e-3, abs=1e-6)
        assert found.norm == pytest.approx(float(s.norm()), rel=1e-5)


@pytest.mark.parametrize("shape", [(5, 11), (11, 5)])
def test_an_update_of_zeros_stays_one(shape: tuple[int, int]) -> None:
    record, error = truncate_dense(torch.zeros(shape), 3)
    pair = record.low_rank
    assert pair is not None
    assert error == 0.0
    assert not (pair.b @ pair.a).any()


def test_an_update_of_full_rank_has_no_factors_without_a_rank() -> None:
    scaled = Update(LinearDelta(output=Scale(torch.tensor([1.5, 0.5, 2.0]))), DenseWeight(torch.randn(3, 5)))
    with pytest.raises(CompositionError, match="full rank has no factors of its own: give the rank to keep"):
        plain_of(scaled, None)
