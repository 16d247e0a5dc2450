"""Records refuse shapes that do not belong together, while shapes are checked (in tests)."""

from dataclasses import replace

import jaxtyping
import pytest
import torch

from flat_records import flat_record
from veneer.errors import CompositionError
from veneer.records.deltas import LinearDelta
from veneer.records.terms.scale import Scale


def test_shapes_are_checked_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError):
        flat_record(a=torch.ones(2, 5), b=torch.ones(7, 3))


def test_the_rank_of_a_record():
    assert LinearDelta().rank == 0
    assert flat_record(a=torch.ones(2, 5), b=torch.ones(7, 2)).rank == 2


def test_only_pairs_can_be_split_by_expert():
    stacked = LinearDelta.pair(torch.randn(3, 2, 7), torch.randn(3, 5, 2), 0.3)
    alone = stacked.of_expert(2).low_rank
    torch.testing.assert_close(alone.dense(torch.float32), stacked.low_rank.dense(torch.float32)[2])
    assert LinearDelta().of_expert(1) == LinearDelta()
    for rest in ({"output": Scale(torch.ones(5))}, {"bias": torch.ones(5)}):
        with pytest.raises(CompositionError, match="cannot be split by expert: stacked experts take low-rank pairs al"):
            replace(stacked, **rest).of_expert(0)
