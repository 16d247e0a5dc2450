"""Task vectors: closed forms, and the rule that a draw is a function of its seed."""

import pytest
import torch

from veneer.combine.task_vectors import TaskVectors, merge_task_vectors
from veneer.errors import CompositionError

BASE = torch.tensor([10.0, 20.0, 30.0, 40.0])
CHANGES = [torch.tensor([2.0, -1.0, 0.5, 8.0]), torch.tensor([4.0, 3.0, -0.25, -9.0])]
TUNED = [BASE + change for change in CHANGES]
WEIGHTS = (0.5, 2.0)


def changed(**plan):
    return merge_task_vectors(BASE, TUNED, WEIGHTS, TaskVectors(**plan)) - BASE


def test_task_arithmetic_is_the_weighted_sum():
    expected = 0.5 * CHANGES[0] + 2 * CHANGES[1]
    torch.testing.assert_close(changed(), expected)
    torch.testing.assert_close(changed(normalize=True), expected / 2.5)
    torch.testing.assert_close(changed(scale=0.3), expected * 0.3)


def test_ties_votes_with_weighted_values_and_divides_by_the_weights_that_agree():
    kept = changed(how="ties", density=0.75)  # the third entry of each is cut
    torch.testing.assert_close(kept, torch.tensor([(1.0 + 8.0) / 2.5, 6.0 / 2.0, 0.0, -18.0 / 2.0]))
    bare = changed(how="ties", density=0.75, normalize=False, scale=2.0)
    torch.testing.assert_close(bare, torch.tensor([18.0, 12.0, 0.0, -36.0]))


def test_a_vote_by_signs_can_differ_from_one_by_values():
    tuned = [BASE + d for d in (torch.full((4,), 1.0), torch.full((4,), 2.0), torch.full((4,), -9.0))]
    by = {
        vote: merge_task_vectors(BASE, tuned, (1.0, 1.0, 1.0), TaskVectors(how="ties", density=1, vote=vote)) - BASE
        for vote in ("total", "frequency")
    }
    assert by["total"].tolist() == [-9.0] * 4
    assert by["frequency"].tolist() == [1.5] * 4


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
def test_dare_keeps_the_expectation_and_follows_its_generator(how):
    base, change = torch.zeros(100, 101), torch.full((100, 101), 0.7)
    plan = TaskVectors(how=how, density=0.3)

    def draw(seed):
        return merge_task_vectors(base, [change], (2.0,), plan, torch.Generator().manual_seed(seed))

    first = draw(3)
    assert first.unique().tolist() == [0.0, pytest.approx(1.4 / 0.3)]
    assert float(first.mean()) == pytest.approx(1.4, rel=0.05)
    assert torch.equal(draw(3), first)
    assert not torch.equal(draw(4), first)


def test_sixteen_bits_are_rounded_once():
    base = torch.randn(67, generator=torch.Generator().manual_seed(1)).bfloat16()
    tuned = [(base + 0.01 * i).bfloat16() for i in (1, 2, 3)]
    found = merge_task_vectors(base, tuned, (0.3, 0.3, 0.3), TaskVectors())
    wide = base.double() + sum(0.3 * (t.double() - base.double()) for t in tuned)
    assert torch.equal(found, wide.bfloat16())


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"how": "slerp"}, "must be one of"),
        ({"how": "ties"}, "is needed by how='ties'"),
        ({"density": 0.5}, "has no meaning for how='task_arithmetic'"),
        ({"how": "ties", "density": 1.5, "scale": float("nan")}, r"must lie in \(0, 1\]; scale=nan"),
        ({"vote": "loud"}, "vote='loud' must be one of"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(plan, message):
    with pytest.raises(CompositionError, match=message):
        TaskVectors(**plan)


def test_weights_that_cancel_cannot_be_normalized():
    with pytest.raises(CompositionError, match="add up to zero"):
        merge_task_vectors(BASE, TUNED, (0.5, -0.5), TaskVectors(normalize=True))


@pytest.mark.parametrize("weights", [(0.5,), (0.5, 2.0, 1.0), (0.5, float("nan"))])
def test_one_finite_weight_is_needed_for_each_tuned_model(weights):
    with pytest.raises(
        CompositionError, match=r"2 tuned models are combined with weights=.*: give one finite number for each model"
    ):
        merge_task_vectors(BASE, TUNED, weights, TaskVectors())
