"""Rows of a micro-batch that give a gradient, grouped by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def learning_rows(advantages: Tensor) -> Int[Tensor, " k"] | None:
    """Return the indices of the rows whose advantage is not 0, at least one; None if no row has advantage 0."""
    if advantages.ndim != 1 or bool((advantages != 0).all()):
        return None
    rows = advantages.nonzero().flatten()
    return rows if len(rows) else rows.new_zeros(1)  # a pass of no row has no gradient to share with other processes


def of_all_rows(known: Float[Tensor, "b t"], rows: Int[Tensor, " k"], found: Float[Tensor, "k t"]) -> Tensor:
    """Return values of all rows: ``found`` for these ``rows``, with their gradient, and ``known`` for the others."""
    return known.to(found.device, found.dtype).index_copy(0, rows.to(found.device), found)


def equal_groups(rewards: Float[Tensor, "b functions"], n: int) -> Tensor:
    """Return True for each row (b,) of a group of n whose rewards are all equal, bit by bit, NaN (no opinion) too.

    Rows without any opinion do not count.
    """
    groups = rewards.view(-1, n, rewards.shape[1])
    told = ~groups.isnan().all(dim=2)
    firsts = told.int().argmax(dim=1)  # the first row of each group with an opinion
    groups = groups.nan_to_num(nan=torch.inf)
    first = groups[torch.arange(len(groups), device=groups.device), firsts].unsqueeze(1)
    return ((groups == first).all(dim=2) | ~told).all(dim=1).repeat_interleave(n)


def by_prompt(batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return micro-batches of the same rows and sizes in which rows of one prompt are neighbours.

    Prompts are in the order in which they first appear. Batches with images, whose tensors hold patches and not rows,
    stay as they are.
    """
    if any(isinstance(value, list) for value in batches[0].values()):
        return list(batches)
    whole = {key: _joined([batch[key] for batch in batches]) for key in batches[0]}
    prompts = [tuple(row) for row in torch.cat([whole["prompt_ids"], whole["prompt_mask"]], dim=1).tolist()]
    first = {prompt: place for place, prompt in reversed(list(enumerate(prompts)))}
    order = torch.tensor(sorted(range(len(prompts)), key=lambda place: first[prompts[place]]))
    n = len(prompts) // len(batches)
    return [
        {key: _chosen(value, order[start : start + n]) for key, value in whole.items()}
        for start in range(0, len(prompts), n)
    ]


def _joined(values: Sequence[Any]) -> Any:
    return torch.cat(list(values)) if isinstance(values[0], Tensor) and values[0].ndim else values[0]


def _chosen(value: Any, rows: Tensor) -> Any:
    return value[rows.to(value.device)] if isinstance(value, Tensor) and value.ndim else value
