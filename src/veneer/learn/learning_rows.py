"""Selects the rows of a micro-batch that give a gradient, and groups rows by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def learning_rows(advantages: Tensor) -> Int[Tensor, " k"] | None:
    """Return the indices of the rows whose advantage is not 0; if all are 0, return one index.

    Return None if no advantage is 0, or if there is an advantage for each token.
    """
    if advantages.ndim != 1 or bool((advantages != 0).all()):
        return None
    rows = advantages.nonzero().flatten()
    return rows if len(rows) else rows.new_zeros(1)  # a pass of no row has no gradient to share with other processes


def of_all_rows(known: Float[Tensor, "b t"], rows: Int[Tensor, " k"], found: Float[Tensor, "k t"]) -> Tensor:
    """Return values for all rows: ``found``, with its gradient, at the indices ``rows``, and ``known`` elsewhere."""
    return known.to(found.device, found.dtype).index_copy(0, rows.to(found.device), found)


def equal_groups(rewards: Float[Tensor, "b functions"], n: int) -> Tensor:
    """Return a mask (b,) that is True for the rows of each group of n whose rewards are equal bit by bit.

    NaN, which means no opinion, equals NaN. Rows without any opinion are ignored in the comparison.
    """
    groups = rewards.view(-1, n, rewards.shape[1])
    told = ~groups.isnan().all(dim=2)
    firsts = told.int().argmax(dim=1)  # the first row of each group with an opinion
    groups = groups.nan_to_num(nan=torch.inf)
    first = groups[torch.arange(len(groups), device=groups.device), firsts].unsqueeze(1)
    return ((groups == first).all(dim=2) | ~told).all(dim=1).repeat_interleave(n)


def by_prompt(batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rearrange the rows of micro-batches so that rows of one prompt are neighbours. The batches keep their sizes.

    Prompts are in the order in which they first appear. If a batch has images, all batches are returned unchanged: its
    image tensors hold patches instead of rows.
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
