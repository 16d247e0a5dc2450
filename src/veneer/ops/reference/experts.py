"""Experts of a mixture in plain torch: the specification."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.ops.experts import ExpertSegment, PackedStack, Router, Shared
from veneer.ops.glu import unit_forward
from veneer.ops.pairs import Segment, add_pairs


def route(scores: Tensor, router: Router, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    values = scores.float().softmax(-1) if router.values == "softmax" else scores.float().sigmoid()
    choice = values if bias is None else values + bias
    if router.n_groups > 1:
        groups = choice.view(len(choice), router.n_groups, -1)
        ranks = groups.topk(min(2, groups.shape[2]), dim=-1).values.sum(-1)
        kept = torch.zeros_like(ranks, dtype=torch.bool).scatter_(1, _largest(ranks, router.kept_groups), True)
        choice = groups.masked_fill(~kept[:, :, None], -torch.inf).flatten(1)
    ids = _largest(choice, router.top_k)
    weights = values.gather(1, ids)
    if router.normalized:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
    return ids, weights * router.scale


def mix(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    stacks: tuple[PackedStack, PackedStack],
    activation: str,
    shared: Shared,
    segments: Sequence[ExpertSegment],
) -> Tensor:
    inner, down = stacks
    out = x.new_zeros(*ids.shape, down.shape[1])
    for number in torch.unique(ids).tolist():
        row, place = torch.where(ids == number)
        hidden = inner.expert(number).matmul(x[row], onto=_biases(inner, number, len(row)), backend="reference")
        _add_pairs(hidden, x[row], row, number, 0, segments)
        acted = unit_forward(hidden, activation, backend="reference")
        y = down.expert(number).matmul(acted, onto=_biases(down, number, len(row)), backend="reference")
        _add_pairs(y, acted, row, number, 1, segments)
        out[row, place] = y
    beside, gate = shared
    total = (out.float() * weights[:, :, None]).sum(1)
    if beside is not None:
        total += beside.float() if gate is None else gate.float().sigmoid() * beside.float()
    return total.to(x.dtype)


def _biases(stack: PackedStack, number: int, n: int) -> Tensor | None:
    """Return the bias of one expert for each of n rows, or None."""
    return None if stack.bias is None else stack.bias[number].expand(n, -1)


def _add_pairs(y: Tensor, x: Tensor, row: Tensor, number: int, layer: int, segments: Sequence[ExpertSegment]) -> None:
    """Add the products of the adapters' low-rank pairs for one expert at one layer (0: gate and up, 1: down) to the
    expert's outputs ``y``.

    Row i of x and y is row ``row[i]`` of the batch; ``row`` is ascending.
    """
    for segment in segments:
        pairs, (start, stop) = segment.pairs[layer], torch.searchsorted(row, torch.tensor(segment[1:])).tolist()
        if pairs is not None and start < stop:
            add_pairs(x, [Segment(pairs.expert(number), start, stop)], [y], backend="reference")


def _largest(values: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest values; of equal values, the first ones."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
