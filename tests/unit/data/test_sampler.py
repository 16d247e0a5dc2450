"""Rows and indices that make the batches of several processes come out even."""

from collections import Counter
from itertools import chain

import pytest
from datasets import Dataset

from veneer.data.dataset import digest, filled
from veneer.data.encoding import IGNORED
from veneer.data.sampler import EpochSampler, EvenBatches, FilledSampler, last_size


def test_rows_that_fill_up_train_nothing():
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7], "seq_lengths": [1, 2]}] * 3)
    more = filled(rows, 2)
    assert more.features == rows.features
    assert digest(more.select(range(3))) == digest(rows)
    assert more[3:] == {"input_ids": [[5, 5]] * 2, "labels": [[IGNORED] * 2] * 2, "seq_lengths": [[2]] * 2}
    assert filled(rows, 0) is rows
    assert filled(rows.remove_columns("seq_lengths"), 1)[3] == {"input_ids": [5, 5], "labels": [IGNORED] * 2}


def test_they_come_last_in_every_epoch():
    inner = EpochSampler([1] * 7, seed=3)
    sampler = FilledSampler(inner, 7, 11)
    assert len(sampler) == 11
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first[7:] == second[7:] == [7, 8, 9, 10]
    assert sorted(first[:7]) == sorted(second[:7]) == list(range(7))
    assert first != second


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_last_batches_hold_each_row_equally_often_and_first_of_all_once(n):
    for rows in range(43):
        batches = EvenBatches(EpochSampler([1] * rows, seed=3), 3, n)
        found = list(batches)
        assert len(found) == len(batches)
        full = rows - rows % (3 * n)
        assert [len(batch) for batch in found[: full // 3]] == [3] * (full // 3)
        assert {len(batch) for batch in found[full // 3 :]} == ({last_size(rows - full, n)} if rows > full else set())
        assert set(chain(*found)) == set(range(rows))
        last = list(chain(*found[full // 3 :]))
        counts = Counter(last)
        assert len(counts) == len(set(last[: rows - full])) == rows - full  # gathered values are cut to so many
        assert len(set(counts.values())) <= 1


def test_rows_that_several_processes_can_share_are_shared():
    assert [last_size(left, 2) for left in range(6)] == [0, 1, 1, 3, 2, 5]
    assert [last_size(left, 6) for left in (2, 3, 4, 9, 12)] == [1, 1, 2, 3, 2]
