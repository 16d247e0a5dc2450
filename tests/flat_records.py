"""Records of at most a pair, scales and a bias, from flat fields: for tests that go through all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from veneer.records.deltas import LinearDelta
from veneer.records.terms.scale import Scale

FIELDS = ("a", "core", "b", "b_scale", "in_scale", "out_scale", "bias")
"""The fields, in the order in which a record lists its tensors."""


def flat_record(
    *, in_scale: Tensor | None = None, out_scale: Tensor | None = None, bias: Tensor | None = None, **pair: Any
) -> LinearDelta:
    """The record with these fields; ``pair`` are those of `LinearDelta.pair`."""
    return LinearDelta(
        adds=LinearDelta.pair(**pair).adds if pair.get("a") is not None else (),
        input=None if in_scale is None else Scale(in_scale),
        output=None if out_scale is None else Scale(out_scale),
        bias=bias,
    )


def with_tensors(record: LinearDelta, tensors: Sequence[Tensor]) -> LinearDelta:
    """The record with these in place of its `tensors`."""
    left = iter(tensors)

    def renewed(term: Any) -> Any:
        return None if term is None else term.with_tensors([next(left) for _ in term.tensors])

    adds = tuple(renewed(term) for term in record.adds)
    around = {"input": renewed(record.input), "output": renewed(record.output)}
    return LinearDelta(adds=adds, **around, bias=None if record.bias is None else next(left))
