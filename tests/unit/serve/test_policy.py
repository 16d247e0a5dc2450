"""Log-probabilities of drawn tokens at a temperature, and the mass that is kept."""

from __future__ import annotations

from array import array

import pytest
import torch

from veneer.ops.sample import RowRule, bit_mask
from veneer.serve.runners.policy import policy_logprobs


def test_log_probabilities_are_those_of_the_whole_distribution_and_the_rest_is_the_kept_mass():
    logits = torch.randn(7, 83, generator=torch.Generator().manual_seed(5)) * 3
    mask = bit_mask(range(0, 83, 2), 83)
    rules = [
        RowRule(temperature=0.7), RowRule(temperature=1.3, top_k=11), RowRule(top_p=0.6), RowRule(min_p=0.1),
        RowRule(allowed=(mask,)), RowRule(banned=array("i", [4, 6])),
        RowRule(biased=(array("i", [4]), array("f", [2.0]))),
    ]  # fmt: skip
    tokens = logits.argmax(dim=1) // 2 * 2
    own, kept = policy_logprobs(logits, rules, tokens)
    wide = torch.stack([row.double() / rule.temperature for row, rule in zip(logits, rules, strict=True)])
    p = wide.softmax(dim=1)
    assert own.tolist() == pytest.approx(p.gather(1, tokens[:, None])[:, 0].log().tolist(), abs=1e-6)
    sorted_p = p[2].sort(descending=True).values
    expected = [
        1.0, p[1].topk(11).values.sum(), sorted_p[: int((sorted_p.cumsum(0) < 0.6).sum()) + 1].sum(),
        p[3][p[3] >= 0.1 * p[3].max()].sum(), p[4][::2].sum(), 1 - p[5][4] - p[5][6], 1.0,
    ]  # fmt: skip
    assert kept.exp().tolist() == pytest.approx([float(each) for each in expected], abs=1e-6)
