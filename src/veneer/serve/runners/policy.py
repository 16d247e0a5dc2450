"""Log-probabilities of drawn tokens under the distribution of a policy gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from veneer.ops.reference.sample import changed, narrowed
from veneer.ops.sample import RowRule, draw


def policy_logprobs(
    logits: Float[Tensor, "n vocabulary"], rules: Sequence[RowRule], tokens: Int64[Tensor, " n"]
) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " n"]]:
    """Return, for each token, its log-probability at the rule's temperature over all ids, and the kept mass.

    The kept mass is the logarithm of the share of this distribution that masks, ``min_p``, ``top_k`` and ``top_p``
    leave; it is 0 without them. The difference of the two numbers is the token's log-probability among the ids that are
    left. Biases and penalties count in neither. A result depends only on its own row. Every temperature is above 0.
    """
    rates = torch.tensor([1 / rule.temperature for rule in rules], dtype=torch.float32, device=logits.device)
    scaled = logits.float() * rates[:, None]
    scored = [RowRule(target=token, n_likeliest=0) for token in tokens.tolist()]
    kept = [_kept(row, rule) if _leaves_out(rule) else 0.0 for row, rule in zip(logits, rules, strict=True)]
    return draw(scaled, scored).logprobs, torch.tensor(kept, dtype=torch.float64)


def _leaves_out(rule: RowRule) -> bool:
    return bool(rule.allowed or rule.banned or rule.min_p > 0 or rule.top_k > 0 or rule.top_p < 1)


def _kept(logits: Tensor, rule: RowRule) -> float:
    wide = logits.double() / rule.temperature
    masks = replace(rule, biased=None, repetition=1.0, seen=None, counted=None)
    left = narrowed(changed(logits.float(), masks), rule) > 0
    return float(wide[left].logsumexp(dim=0) - wide.logsumexp(dim=0))
