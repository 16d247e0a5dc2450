"""Embedding table whose rows stay in quantized blocks. A look-up decodes only the rows that it returns."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.model.quantized.module import CodedModule
from veneer.quant.blocks import BlockWeight
from veneer.quant.spec import StorageSpec


class CodedEmbedding(CodedModule):
    """Look-up in a table (n_tokens, width) in the storage format of ``spec``, whose weights are `BlockWeight`.

    It replaces an ``nn.Embedding`` and can neither be adapted nor resized. Values have the dtype to which the module is
    cast.
    """

    def __init__(self, spec: StorageSpec, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        super().__init__(spec)
        self.num_embeddings, self.embedding_dim = spec.shape
        self.padding_idx = padding_idx
        # without values: cast with the module, and the first parameter of a model, by which others tell its dtype
        self.like = nn.Parameter(torch.empty(0, dtype=dtype, device="cpu"), requires_grad=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        table = cast(BlockWeight, self.bound())
        rows = table.rows(token_ids.reshape(-1)).to(self.like.dtype)
        return rows.view(*token_ids.shape, self.embedding_dim)

    def dense_table(self) -> Tensor:
        """Return the whole table, decoded."""
        return self.bound().dense(self.like.dtype)

    def _load_from_state_dict(self, *args: Any) -> None:
        like = self._parameters.pop("like")  # no file holds it
        try:
            super()._load_from_state_dict(*args)
        finally:
            self._parameters["like"] = like

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def table_shape(table: nn.Module) -> tuple[int, int]:
    """Return the tokens and the width of a table of embeddings, dense or coded."""
    if isinstance(table, CodedEmbedding):
        return table.num_embeddings, table.embedding_dim
    n_tokens, width = cast(Tensor, table.weight).shape
    return n_tokens, width
