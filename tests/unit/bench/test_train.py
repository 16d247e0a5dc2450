"""bench/training/train.py counts the products of the step that it times."""

import pytest
from datasets import Dataset

from bench.training import train_sides as sides


@pytest.fixture
def rows():
    lengths = [[3, 2], [2, 2], [5], [4], [5], [2, 3], [1, 3], [5]]
    return Dataset.from_list([{"input_ids": [7] * sum(row), "seq_lengths": row} for row in lengths])


def test_a_step_of_its_own_takes_whole_batches_of_the_tokens_end_to_end(rows):
    assert sides.timed_tokens(sides.ROWS["dense"], rows) == (4 * 5, 4 * 4)


def test_a_trainers_second_step_takes_the_rows_as_they_are_packed(rows):
    assert sides.timed_tokens(sides.ROWS["trainer"], rows) == (19, 13)
