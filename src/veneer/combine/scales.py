"""Sum of adapters that only rescale (IA3).

Since ``diag(l) W - W = diag(l - 1) W``, the exact weighted sum is the scale ``1 + Σ w_i (l_i - 1)``.

Departs from PEFT, which takes ``Σ w_i l_i``: equal only if the weights add up to one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from veneer.combine.update import Update
from veneer.errors import CompositionError
from veneer.records.deltas import LinearDelta
from veneer.records.terms.scale import Scale


def only_scales(updates: Sequence[Update]) -> bool:
    """Return True if every update is a pure rescaling."""
    return all(u.record.only_scales for u in updates)


def combined_scales(updates: Sequence[Update], weights: Sequence[float], how: str) -> LinearDelta:
    """Return the record of the weighted sum of rescalings. Raises CompositionError for a method other than "linear".

    It is also raised if one update scales the layer's inputs and another its outputs.
    """
    if how != "linear":
        raise CompositionError(f"adapters that only rescale (IA3) can be combined with how='linear', not {how!r}")
    ins, outs = [u.record.input_scale for u in updates], [u.record.output_scale for u in updates]
    if any(x is not None for x in ins) and any(x is not None for x in outs):
        raise CompositionError(
            "one adapter scales the input of this layer and another its output: their sum is not a scale. Combine "
            "adapters that scale the same side"
        )
    return LinearDelta(input=_sum_of_changes(ins, weights), output=_sum_of_changes(outs, weights))


def _sum_of_changes(scales: Sequence[Tensor | None], weights: Sequence[float]) -> Scale | None:
    present = [(s, w) for s, w in zip(scales, weights, strict=True) if s is not None]
    if not present:
        return None
    return Scale(sum(((s - 1) * w for s, w in present), present[0][0].new_ones(present[0][0].shape)))
