"""Records refuse shapes that do not belong together, while shapes are checked (in tests)."""

import jaxtyping
import pytest
import torch

from flat_records import flat_record
from veneer.core.records import LinearDelta


def test_shapes_are_checked_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError):
        flat_record(a=torch.ones(2, 5), b=torch.ones(7, 3))


def test_the_rank_of_a_record():
    assert LinearDelta().rank == 0
    assert flat_record(a=torch.ones(2, 5), b=torch.ones(7, 2)).rank == 2
