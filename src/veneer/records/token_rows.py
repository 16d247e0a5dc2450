"""Trained single rows of an otherwise frozen embedding table: look-up, merging into the table, and use in the head.

``rows (n, d)`` replace the rows ``index (n)`` of a table (n_tokens, d). They are not added to it, so that a table whose
new rows start at random gives the same model wherever it is loaded.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from veneer.records.terms.term import RowsProduct


def put_rows(
    table: Float[Tensor, "n_tokens d"], index: Int[Tensor, " n"], rows: Float[Tensor, "n d"]
) -> Float[Tensor, "n_tokens d"]:
    """Return a copy of a table in which ``rows`` replace the rows ``index``, in the table's dtype."""
    return table.index_copy(0, index, rows.to(table.dtype))


def look_up_rows(
    token_ids: Int[Tensor, "*batch"],
    looked_up: Float[Tensor, "*batch d"],
    index: Int[Tensor, " n"],
    rows: Float[Tensor, "n d"],
    padding_id: int | None = None,
) -> Float[Tensor, "*batch d"]:
    """Look token ids up in the table of `put_rows`, without copying it. ``looked_up`` is their look-up in the frozen
    table.

    The row of ``padding_id`` gets no gradient, as in torch's embedding.
    """
    ordered, order = index.sort()
    place = torch.searchsorted(ordered, token_ids).clamp_max(len(index) - 1)
    hit = ordered[place] == token_ids
    padding = (index == padding_id).nonzero().flatten().tolist() if padding_id is not None else []
    found = torch.nn.functional.embedding(order[place], rows, padding_idx=padding[0] if padding else None)
    return torch.where(hit[..., None], found.to(looked_up.dtype), looked_up)


def project_rows(
    x: Float[Tensor, "*batch d"],
    y: Float[Tensor, "*batch n_tokens"],
    index: Int[Tensor, " n"],
    rows: Float[Tensor, "n d"],
    bias: Float[Tensor, " n_tokens"] | None = None,
    linear: RowsProduct = torch.nn.functional.linear,
) -> Float[Tensor, "*batch n_tokens"]:
    """Return the output of a head whose weight is the table of `put_rows`. ``y`` is its output with the frozen weight.

    ``linear`` multiplies x by the rows. Only the rows get a gradient; that of the whole table is never formed.
    """
    own = linear(x, rows.to(x.dtype), None if bias is None else bias[index])
    return y.index_copy(-1, index, own.to(y.dtype))
