"""The proof that the engine draws from the policy in training, on log-probabilities that part."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from veneer.learn.proof import PolicyMismatchError, beyond, require_same_policy, rounded_otherwise

OWN = torch.full((3, 5), -7.0)
COUNTED = torch.tensor([[True] * 5, [True] * 4 + [False], [True] * 5])
ANSWERS = [[11, 12, 13, 14, 15]] * 3


def parted(row: int, place: int, by: float) -> torch.Tensor:
    drawn = OWN.clone()
    drawn[row, place] += by
    return drawn


def test_a_token_beyond_the_bound_is_told() -> None:
    drawn = parted(2, 1, -1.3e-3)
    assert beyond(drawn, OWN, COUNTED)
    with pytest.raises(
        PolicyMismatchError, match=r"token 12, number 1 of answer 2, .* allowed are 1\.0e-03, and 0\.0001"
    ):
        require_same_policy(drawn, OWN, COUNTED, ANSWERS)
    within, padding = parted(2, 1, 0.9e-3), parted(1, 4, 7.0)
    assert not beyond(within, OWN, COUNTED)
    assert not beyond(padding, OWN, COUNTED)
    require_same_policy(padding, OWN, COUNTED, ANSWERS)
    assert beyond(parted(0, 0, float("nan")), OWN, COUNTED)


def test_an_answer_whose_roundings_are_amplified_may_part_further() -> None:
    rounding = torch.full_like(OWN, 2e-6)
    rounding[2, 3] = 3e-5
    require_same_policy(parted(2, 1, 1.3e-3), OWN, COUNTED, ANSWERS, rounding)
    for row, by in ((0, 1.3e-3), (2, 3.3e-3), (2, float("nan"))):
        with pytest.raises(PolicyMismatchError, match=f"of answer {row},"):
            require_same_policy(parted(row, 1, by), OWN, COUNTED, ANSWERS, rounding)


def test_a_mean_beyond_its_bound_is_refused_however_roundings_are_amplified() -> None:
    with pytest.raises(PolicyMismatchError, match=r"mean difference 2\.0e-04"):
        require_same_policy(OWN + 2e-4, OWN, COUNTED, ANSWERS, torch.ones_like(OWN))


def test_embeddings_are_wrong_by_a_rounding_at_most_and_only_within() -> None:
    embeddings, ids = nn.Embedding(11, 7), torch.arange(11)
    right = embeddings(ids)
    with rounded_otherwise(embeddings):
        found = embeddings(ids)
    assert not torch.equal(found, right)
    torch.testing.assert_close(found, right, rtol=1.2e-7, atol=0)
    assert torch.equal(embeddings(ids), right)
