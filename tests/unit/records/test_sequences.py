"""Sequences of a pass: which tokens belong together, and means over them."""

from __future__ import annotations

import pytest
import torch

from veneer.errors import ShapeError
from veneer.records.sequences import Sequences, means, members_of_rows

MASK = torch.tensor([[0, 1, 1], [1, 1, 0]])


def test_a_mean_is_over_the_tokens_of_a_row_without_its_padding():
    known = Sequences.of(MASK)
    values = torch.tensor([[9.0], [1.0], [3.0], [5.0], [8.0], [70.0]])
    assert means(values, known.members).flatten().tolist() == [0, 2, 2, 6.5, 6.5, 0]


def test_a_sequence_begins_where_positions_do_not_ascend():
    known = Sequences.of(torch.ones(2, 4, dtype=torch.long), torch.tensor([[0, 1, 0, 0], [0, 1, 2, 3]]))
    together = (known.members @ known.members.T).bool()
    assert together[:4, :4].tolist() == torch.block_diag(torch.ones(2, 2), torch.ones(1), torch.ones(1)).tolist()
    assert together[4:, 4:].all()
    assert not together[:4, 4:].any()


def test_rows_keep_their_sequences():
    known = Sequences.of(MASK)
    some = known.of_rows(torch.tensor([1, 1]))
    assert some.shape == (2, 3)
    assert torch.equal(some.members, known.members[3:].repeat(2, 1))
    assert torch.equal(members_of_rows((2, 3), torch.device("cpu")), Sequences.of(torch.ones_like(MASK)).members)


def test_an_input_of_other_tokens_has_its_rows_or_is_refused():
    known = Sequences.of(MASK)
    assert known.at((2, 3)) is known.at((6,)) is known.members
    assert known.at((5, 7)) is None
    with pytest.raises(ShapeError, match=r"input of shape \(5,\) .* = \(2, 3\)\), .* exclude_modules"):
        known.at((5,))
