"""Rows and indices that make the batches of several processes come out even."""

from datasets import Dataset

from veneer.data.dataset import digest, filled
from veneer.data.encoding import IGNORED
from veneer.data.sampler import EpochSampler, FilledSampler


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
