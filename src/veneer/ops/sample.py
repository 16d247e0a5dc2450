"""Choice of tokens from logits."""

from __future__ import annotations

from jaxtyping import Float, Int64
from torch import Tensor

from veneer.ops.dispatch import implementation


def likeliest(logits: Float[Tensor, "n vocabulary"], *, backend: str | None = None) -> Int64[Tensor, " n"]:
    """Return the index of the largest logit in each row, the first of equal ones.

    The result is -1 if the largest logit is infinite, or any is NaN.
    """
    if not logits.numel():
        return logits.new_full((len(logits),), -1).long()
    found: Tensor = implementation("sample.likeliest", logits.device, backend)(logits)
    return found
