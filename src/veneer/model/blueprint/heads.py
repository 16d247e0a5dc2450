"""Heads in the outputs of joined projections: extraction of queries, keys and values, and its inverse for gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

HeadOrder = Literal["apart", "gated", "joined", "by group"]


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """Layout of heads in the outputs of the projections.

    ``order`` is "apart" for three projections. It is "gated" if the first of them computes each query and then a gate,
    by whose sigmoid the head's output is multiplied (Qwen3-Next). One projection is "joined" if its output is all of q,
    then k, then v (Phi-3, GPT-2). It is "by group" if its output is one group after the other: the queries that share a
    key head, then its k and v (Falcon; GPT-NeoX, with one query each). ``n_heads`` counts query heads.
    """

    order: HeadOrder
    n_heads: int
    n_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Number of query heads that share a key head."""
        return self.n_heads // self.n_kv_heads

    def split(self, outputs: Sequence[Float[Tensor, "n _"]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (n, heads, d), k and v (n, kv_heads, d), without gates. They are views of the projections' outputs.

        Only q of the order "by group" is a copy if several groups have several queries each.
        """
        if self.order == "gated":
            q, k, v = (t.view(t.shape[0], -1, self.head_dim) for t in outputs)
            q = q[:, ::2]
        elif self.order == "apart":
            q, k, v = (t.view(t.shape[0], -1, self.head_dim) for t in outputs)
        elif self.order == "by group":
            groups = outputs[0].view(len(outputs[0]), self.n_kv_heads, self.group + 2, self.head_dim)
            q, k, v = groups[:, :, :-2].reshape(len(groups), -1, self.head_dim), groups[:, :, -2], groups[:, :, -1]
        else:
            sizes = [self.n_heads, self.n_kv_heads, self.n_kv_heads]
            q, k, v = torch.split(outputs[0].view(len(outputs[0]), -1, self.head_dim), sizes, dim=1)
        return q, k, v

    def gates(self, outputs: Sequence[Float[Tensor, "n _"]]) -> Float[Tensor, "n heads d"] | None:
        """Return the gates, before their sigmoid, by which the heads' outputs are multiplied. Return None if the layout
        has no gates.
        """
        return outputs[0].view(len(outputs[0]), -1, self.head_dim)[:, 1::2] if self.order == "gated" else None

    def join(self, qkv: Sequence[Tensor], gates: Tensor | None = None) -> list[Float[Tensor, "n _"]]:
        """Return the inverse of `split`: q, k, v and the gates in the layout of the projections' outputs."""
        if gates is not None:
            qkv = [torch.stack([qkv[0], gates], dim=2), *qkv[1:]]
            return [t.flatten(1) for t in qkv]
        if self.order == "apart":
            return [t.view(len(t), -1) for t in qkv]
        if self.order == "by group":
            qkv = [t.reshape(len(t), self.n_kv_heads, -1, self.head_dim) for t in qkv]
        joined = torch.cat(list(qkv), dim=-2)
        return [joined.view(len(joined), -1)]
