"""The directions of EVA, brought up to date batch by batch, are those of all rows at once."""

import pytest
import torch

from veneer.inits.eva import shared_ranks, updated


def test_batch_by_batch_gives_the_decomposition_of_all_rows():
    rows = torch.randn(97, 11, generator=torch.Generator().manual_seed(3)) * torch.arange(1.0, 12.0) + 5.0
    found = None
    for batch in rows.split([41, 23, 33]):
        found = updated(found, batch, 11)
    wide = rows.double()
    _, values, vectors = torch.linalg.svd(wide - wide.mean(dim=0), full_matrices=False)
    torch.testing.assert_close(found.values.double(), values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        (found.vectors.double() * vectors).sum(dim=1).abs(), torch.ones(11).double(), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(found.mean, wide.mean(dim=0), rtol=1e-6, atol=1e-6)
    assert found.explained().sum().item() == pytest.approx(1.0, rel=1e-5)
    assert found.n_rows == 97


def test_directions_settle_where_another_batch_hardly_turns_them():
    rows = torch.randn(401, 7, generator=torch.Generator().manual_seed(4)) * torch.tensor([9.0, 5.0, 3.0, 1, 1, 1, 0])
    first = updated(None, rows, 7)
    assert not first.settled(0.0).any()
    again = updated(first, rows, 7)
    assert again.settled(0.999).all()
    assert again.varies().tolist() == [True] * 6 + [False]
    torch.testing.assert_close(again.start(3, whiten=True).norm(dim=1), again.values[:3].rsqrt())


def test_ranks_go_to_the_best_directions_and_to_the_earlier_layer_of_equal_ones():
    explained = {"a": torch.tensor([0.5, 0.1]), "b": torch.tensor([0.6, 0.3, 0.1]), "c": torch.tensor([0.05])}
    assert shared_ranks(explained, 4) == {"a": 2, "b": 2, "c": 0}
    assert shared_ranks(explained, 99) == {"a": 2, "b": 3, "c": 1}
