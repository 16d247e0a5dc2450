"""The decomposition of an update from its factors: that of the matrix itself, in float64."""

from __future__ import annotations

import pytest
import torch

from flat_records import flat_record
from veneer.errors import CompositionError
from veneer.records.svd import svd_of_factors


@pytest.mark.parametrize(("o", "i", "r"), [(13, 11, 3), (5, 7, 11)])
def test_it_is_that_of_the_matrix(o: int, i: int, r: int) -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((r, i), (o, r)))
    u, s, vt = svd_of_factors(flat_record(a=a, b=b, scale=-1.7))
    torch.testing.assert_close(u @ s.diag() @ vt, -1.7 * b @ a)
    torch.testing.assert_close(s, torch.linalg.svdvals(-1.7 * b @ a)[: len(s)])
    assert len(s) == min(o, i, r)


def test_an_update_without_factors_has_none() -> None:
    with pytest.raises(CompositionError, match="nothing to decompose"):
        svd_of_factors(flat_record(out_scale=torch.ones(3)))
