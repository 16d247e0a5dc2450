"""Keys and values of a program's layers in pages: appended to and attended to by the rows of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.model.blueprint.parts import Attention
from veneer.model.paged import attend
from veneer.serve.step import Group, Step


def append(step: Step, layer: int, keys: Tensor, values: Tensor) -> None:
    """Put the keys and values (n, kv_heads, width) of a step's rows into their slots."""
    step.store.write(layer, step.slots, keys, values)


def paged_attention(step: Step, layer: int, queries: Tensor, part: Attention) -> Tensor:
    """Attention of queries (n, heads, width) to their own sequences, (n, heads · width); their own keys are there."""
    out = torch.empty_like(queries)
    for number, group in enumerate(step.groups):
        keys, values = (x.transpose(1, 2) for x in step.store.read(layer, group.slots))
        own = queries[group.rows].transpose(1, 2) * part.scale
        mixed = attend(own, keys, values, _mask(step, number, group, part.window), part.softcap, None)
        out[group.rows] = mixed.transpose(1, 2)
    return out.flatten(1)


def _mask(step: Step, number: int, group: Group, window: int | None) -> Tensor:
    """The keys that each query sees, (g, 1, c, L): those up to itself within the window."""
    key = ("mask", number, window)
    if key not in step.shared:
        ahead = torch.arange(group.slots.shape[1], device=group.slots.device) - group.places[:, :, None]
        seen = ahead <= 0 if window is None else (ahead <= 0) & (ahead > -window)
        step.shared[key] = seen[:, None]
    kept: Tensor = step.shared[key]
    return kept
