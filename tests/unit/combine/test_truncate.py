"""The nearest update of a rank against an SVD in float64, for tall, wide and deficient matrices."""

from __future__ import annotations

import pytest
import torch

from veneer.combine.plain import plain_of
from veneer.combine.truncate import rank_within, truncate_dense
from veneer.combine.update import Update
from veneer.core.records import LinearDelta
from veneer.core.terms.scale import Scale
from veneer.errors import CompositionError
from veneer.quant.dense import DenseWeight


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
