"""Combining updates: closed forms in float64, and PEFT's operators where they agree with the papers."""

import dataclasses

import pytest
import torch
from peft.utils.merge_utils import dare_linear as peft_dare_linear
from peft.utils.merge_utils import magnitude_prune as peft_magnitude_prune
from peft.utils.merge_utils import ties as peft_ties

from flat_records import flat_record
from veneer.combine import Combination, combine
from veneer.combine.sparsify import draw_of, drop_and_rescale, largest
from veneer.combine.ties import elect_and_merge
from veneer.combine.update import Update
from veneer.errors import CompositionError
from veneer.quant.dense import DenseWeight
from veneer.records.deltas import LinearDelta
from veneer.records.linear import fold_linear
from veneer.records.terms.scale import Scale

O, I = 13, 17  # noqa: E741
WEIGHTS = (0.7, -0.4, 1.3)


def lowrank(seed: int, r: int = 3, scale: float = 1.7) -> Update:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(r, I, generator=g, dtype=torch.float64), torch.randn(O, r, generator=g, dtype=torch.float64)
    return Update(flat_record(a=a, b=b, scale=scale))


def dora(seed: int) -> Update:
    g = torch.Generator().manual_seed(seed)
    record = lowrank(seed).record
    weight = DenseWeight(torch.randn(O, I, generator=g))
    out_scale = torch.rand(O, generator=g, dtype=torch.float64) + 0.5
    return Update(dataclasses.replace(record, output=Scale(out_scale)), weight)


def matrix(record: LinearDelta) -> torch.Tensor:
    return Update(record).dense()


UPDATES = [lowrank(1, 2, 1.7), lowrank(2, 5, 0.6), lowrank(3, 3, 2.2)]
DENSE = [u.dense() for u in UPDATES]
SUM = sum(w * d for w, d in zip(WEIGHTS, DENSE, strict=True))


@pytest.mark.parametrize("how", ["linear", "cat"])
def test_linear_and_cat_are_the_exact_sum_for_mixed_ranks_and_negative_weights(how):
    record, error = combine(UPDATES, WEIGHTS, Combination(how=how))
    assert error == 0
    assert record.rank == 10
    torch.testing.assert_close(matrix(record), SUM, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("how", "rank"), [("linear", 4), ("svd", 4), ("svd", None)])
def test_truncation_is_the_best_of_its_rank_and_reports_its_error(how, rank):
    record, error = combine(UPDATES, WEIGHTS, Combination(how=how, rank=rank))
    kept = rank or 5
    s = torch.linalg.svdvals(SUM)
    assert record.rank == kept
    assert error == pytest.approx(float(s[kept:].norm() / s.norm()), rel=1e-9)
    assert float((matrix(record) - SUM).norm() / SUM.norm()) == pytest.approx(error, rel=1e-9)


def test_a_dora_update_is_what_folding_it_changes():
    update = dora(5)
    base = update.weight.dense(torch.float32)
    record, error = combine([update, lowrank(2)], (0.5, 1.5), Combination(how="linear", rank=O))
    expected = 0.5 * (fold_linear(update.record, base)[0] - base) + 1.5 * lowrank(2).dense()
    assert error < 1e-7
    torch.testing.assert_close(matrix(record).double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_scales_add_up_as_updates_do():
    l1, l2 = torch.rand(O, dtype=torch.float64) + 0.5, torch.rand(O, dtype=torch.float64) + 0.5
    record, _ = combine(
        [Update(flat_record(out_scale=l1)), Update(flat_record(out_scale=l2))], (0.7, 0.9), Combination()
    )
    weight = torch.randn(O, I, dtype=torch.float64)
    expected = weight + 0.7 * (l1[:, None] * weight - weight) + 0.9 * (l2[:, None] * weight - weight)
    torch.testing.assert_close(record.output_scale[:, None] * weight, expected)


def test_factorwise_is_peft_linear_and_not_the_sum():
    same = [lowrank(1), lowrank(2, scale=0.6)]
    record, _ = combine(same, (0.7, -0.4), Combination(how="factorwise"))
    roots = [(0.7 * 1.7) ** 0.5, (0.4 * 0.6) ** 0.5]
    torch.testing.assert_close(
        record.low_rank.a, roots[0] * same[0].record.low_rank.a - roots[1] * same[1].record.low_rank.a
    )
    torch.testing.assert_close(
        record.low_rank.b, roots[0] * same[0].record.low_rank.b + roots[1] * same[1].record.low_rank.b
    )
    exact = 0.7 * same[0].dense() - 0.4 * same[1].dense()
    assert float((matrix(record) - exact).norm() / exact.norm()) > 0.1


@pytest.mark.parametrize("vote", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.31, 1.0])
def test_ties_equals_peft(vote, density):
    ours = elect_and_merge([largest(d, density) for d in DENSE], WEIGHTS, vote)
    theirs = peft_ties(DENSE, torch.tensor(WEIGHTS, dtype=torch.float64), density, vote)
    torch.testing.assert_close(ours, theirs)


def test_magnitude_pruning_equals_peft():
    ours = sum(w * largest(d, 0.43) for w, d in zip(WEIGHTS, DENSE, strict=True))
    theirs = peft_magnitude_prune(DENSE, torch.tensor(WEIGHTS, dtype=torch.float64), 0.43)
    torch.testing.assert_close(ours, theirs)


def test_dare_keeps_the_share_and_the_expectation():
    update = torch.ones(401, 503, dtype=torch.float64) * 3
    kept = drop_and_rescale(update, 0.23, torch.Generator().manual_seed(0))
    assert set(kept.unique().tolist()) == {0.0, 3 / 0.23}
    assert float(kept.mean()) == pytest.approx(3, rel=0.02)
    everything = peft_dare_linear(DENSE, torch.tensor(WEIGHTS, dtype=torch.float64), 1.0)
    torch.testing.assert_close(
        everything, sum(w * drop_and_rescale(d, 1.0) for w, d in zip(WEIGHTS, DENSE, strict=True))
    )


def test_ties_by_weights_divides_by_the_weights_of_those_that_agree():
    updates = [torch.tensor([2.0, -1.0, 0.0]), torch.tensor([4.0, 3.0, 0.0]), torch.tensor([-1.0, 5.0, 0.0])]
    merged = elect_and_merge(updates, (0.5, 2.0, 1.0), divisor="weights")
    torch.testing.assert_close(merged, torch.tensor([(1.0 + 8.0) / 2.5, (6.0 + 5.0) / 3.0, 0.0]))


@pytest.mark.parametrize("how", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_sparse_ways_come_back_to_the_largest_rank(how):
    record, error = combine(UPDATES, WEIGHTS, Combination(how=how, density=0.5))
    assert record.rank == 5
    assert 0 < error < 1


def test_dare_is_reproducible_by_seed_and_layer():
    def drawn(seed: int, name: str) -> torch.Tensor:
        plan = Combination(how="dare_linear", density=0.5, seed=seed)
        return matrix(combine(UPDATES, WEIGHTS, plan, name)[0])

    first = drawn(3, "layers.0.q_proj")
    torch.testing.assert_close(first, drawn(3, "layers.0.q_proj"))
    assert not torch.allclose(first, drawn(4, "layers.0.q_proj"))
    assert not torch.allclose(first, drawn(3, "layers.1.q_proj"))


@pytest.mark.parametrize("vote", ["total", "frequency"])
def test_the_sparse_ways_hold_what_their_operators_say(vote):
    """At full rank nothing is lost, so the values can be compared."""
    kept = [largest(d, 0.43) for d in DENSE]
    thinned = [drop_and_rescale(d, 0.43, g) for g in [draw_of(5, "here")] for d in DENSE]
    weighted = [sum(w * d for w, d in zip(WEIGHTS, parts, strict=True)) for parts in (kept, thinned)]
    expected = {
        "ties": elect_and_merge(kept, WEIGHTS, vote),
        "dare_ties": elect_and_merge(thinned, WEIGHTS, vote),
        "magnitude_prune": weighted[0],
        "dare_linear": weighted[1],
    }
    for how, update in expected.items():
        plan = Combination(how=how, density=0.43, rank=min(O, I), vote=vote, seed=5)
        record, error = combine(UPDATES, WEIGHTS, plan, "here")
        assert error == 0
        torch.testing.assert_close(matrix(record), update)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "slerp"}, "how='slerp' must be 'linear', 'cat', "),
        ({"how": "svd", "rank": 2.5}, "rank=2.5 must be a whole number or None"),
        ({"how": "ties", "density": "0.5"}, "density='0.5' must be a finite number or None"),
        ({"how": "dare_ties", "density": 0.5, "seed": "a"}, "seed='a' must be a whole number"),
        ({"how": "ties"}, "needs a density"),
        ({"how": "linear", "density": 0.5}, "has no meaning"),
        ({"how": "ties", "density": 1.5}, r"must lie in \(0, 1\]"),
        ({"how": "ties", "density": 0.5, "vote": "loudest"}, "vote='loudest' must be 'total' or 'frequency'"),
        ({"how": "cat", "rank": 3}, "sets it itself"),
        ({"how": "svd", "rank": 0}, "at least 1"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(CompositionError, match=message):
        Combination(**options)


def test_what_cannot_be_combined_says_why():
    scale = Update(flat_record(out_scale=torch.ones(O, dtype=torch.float64)))
    with pytest.raises(CompositionError, match="give the base too"):
        combine([scale, lowrank(1)], (1, 1), Combination())
    with pytest.raises(CompositionError, match="one weight for each"):
        combine(UPDATES, (1.0,), Combination())
    with pytest.raises(CompositionError, match="ranks are"):
        combine(UPDATES, WEIGHTS, Combination(how="factorwise"))
    with pytest.raises(CompositionError, match="between 1 and"):
        combine(UPDATES, WEIGHTS, Combination(how="ties", density=0.5, rank=14))
    with pytest.raises(CompositionError, match="how='cat' needs low-rank"):
        combine([dora(1)], (1.0,), Combination(how="cat"))
    with pytest.raises(CompositionError, match="only a bias"):
        Update(flat_record(bias=torch.ones(O))).dense()
    inputs = Update(flat_record(in_scale=torch.ones(I)))
    with pytest.raises(CompositionError, match="not a scale"):
        combine([scale, inputs], (1, 1), Combination())
    with pytest.raises(CompositionError, match="how='linear'"):
        combine([scale], (1,), Combination(how="ties", density=0.2))


@pytest.mark.parametrize("how", ["svd", "dare_linear"])
def test_a_layer_with_fewer_outputs_than_ranks_goes_in_gets_as_many_as_it_has(how):
    g = torch.Generator().manual_seed(7)
    narrow = [Update(flat_record(a=torch.randn(5, I, generator=g), b=torch.randn(3, 5, generator=g))) for _ in "ab"]
    record, error = combine(narrow, (0.7, -0.4), Combination(how=how, density=1 if how == "dare_linear" else None))
    assert (record.rank, error) == (3, 0)
    torch.testing.assert_close(matrix(record), 0.7 * narrow[0].dense() - 0.4 * narrow[1].dense())
