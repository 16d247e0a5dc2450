"""Frozen experts of a mixture in training: rows sorted by expert, forward and backward in x and in the weights.

Each expert's rows are one product. The backward pass keeps the output of the first layers, (n · top_k, 2 · width).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from veneer.ops.experts import Router
from veneer.ops.glu import glu_backward, glu_forward
from veneer.ops.linear.weight import add_transposed, product
from veneer.ops.matmul import operand
from veneer.ops.traced import Traced
from veneer.records.frozen import FrozenWeight

ROWS_AT_ONCE = 32
"""Numbers of rows are multiples of it: for each new size of a product oneDNN takes four times as long."""


@dataclass(frozen=True, slots=True)
class ChosenExperts:
    """Choices ``ids`` (n, top_k) of experts, sorted by expert.

    ``tokens`` holds the row of each sorted choice, ``places`` the sorted index of each choice. ``bounds`` holds for
    each expert its first sorted choice and the one after its last.
    """

    tokens: Int64[Tensor, " choices"]
    places: Int64[Tensor, "n top_k"]
    bounds: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, ids: Int64[Tensor, "n top_k"], n_experts: int, like: Tensor) -> ChosenExperts:
        """Return the sorted choices. If ``like`` has no values, all experts are chosen equally often."""
        n = ids.numel()
        if isinstance(like, Traced):
            order, counts = torch.arange(n), [n * (e + 1) // n_experts - n * e // n_experts for e in range(n_experts)]
        else:
            flat = ids.flatten()
            order, counts = flat.argsort(stable=True), torch.bincount(flat, minlength=n_experts).tolist()
        places = torch.empty_like(order).scatter_(0, order, torch.arange(n, device=order.device))
        ends = torch.tensor(counts).cumsum(0).tolist()
        bounds = tuple((end - count, end) for end, count in zip(ends, counts, strict=True))
        return cls(order // ids.shape[1], places.view(ids.shape), bounds)

    def each(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield each chosen expert: its number, the slice of its choices, and the rows to compute.

        These are the rows of its choices, and some of the following ones, so that their number is a multiple of
        `ROWS_AT_ONCE`.
        """
        for number, (start, stop) in enumerate(self.bounds):
            if start < stop:
                yield number, slice(start, stop), self.tokens[start : stop + (start - stop) % ROWS_AT_ONCE]

    def summed(self, rows: Float[Tensor, "choices d"], weights: Tensor | None = None) -> Float[Tensor, "n d"]:
        """Sum the rows of each token's choices, times their weights, in the order of choice and in float32."""
        total = rows.new_zeros(len(self.places), rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
        for place in range(self.places.shape[1]):
            own = rows[self.places[:, place]]
            total += own if weights is None else own * weights[:, place, None]
        return total.to(rows.dtype)


@dataclass(frozen=True, slots=True)
class FrozenExperts:
    """Weights of the experts' gated feed-forward layers, one entry for each expert.

    ``inner`` are gate and up as one matrix, ``down`` the second layers; ``activation`` is applied between them.
    """

    inner: Sequence[Tensor | FrozenWeight]
    down: Sequence[Tensor | FrozenWeight]
    activation: str

    def forward(
        self, x: Float[Tensor, "n d"], chosen: ChosenExperts, weights: Float[Tensor, "n top_k"]
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "choices inner"]]:
        """Return the weighted sums of the experts' outputs, and the outputs of their first layers."""
        n, (d, width) = len(chosen.tokens), self.down[0].shape
        hidden, out = x.new_empty(n, 2 * width), x.new_empty(n, d)
        for number, rows, tokens in chosen.each():
            count, own = rows.stop - rows.start, x[tokens]
            inner = product(own, operand(own), self.inner[number])
            hidden[rows] = inner[:count]
            acted = glu_forward(inner[:, :width], inner[:, width:], self.activation)
            out[rows] = product(acted, operand(acted), self.down[number])[:count]
        return chosen.summed(out, weights), hidden

    def backward(
        self, dy: Float[Tensor, "n d"], hidden: Float[Tensor, "choices inner"], chosen: ChosenExperts, weights: Tensor
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n top_k"]]:
        """Return the gradients in x and in the weights.

        The gradient in a weight is ⟨downᵀ dy, act(gate) · up⟩, so that the experts' outputs need not be kept.
        """
        width = self.down[0].shape[1]
        by_choice = weights.new_empty(weights.numel()).scatter_(0, chosen.places.flatten(), weights.flatten())
        dx, dweights = dy.new_empty(len(chosen.tokens), dy.shape[1]), torch.empty_like(by_choice)
        for number, rows, tokens in chosen.each():
            count, own, wide = rows.stop - rows.start, dy[tokens], slice(rows.start, rows.start + len(tokens))
            through = add_transposed(None, own, operand(own), self.down[number])
            dinner, dacted = hidden[wide].clone(), (through * by_choice[wide, None]).to(dy.dtype)
            _, _, acted = glu_backward(
                dacted, dinner[:, :width], dinner[:, width:], self.activation, owns_dh=True, owns_inputs=True
            )
            dweights[rows] = (through[:count].float() * acted[:count].float()).sum(1)
            dx[rows] = add_transposed(None, dinner, operand(dinner), self.inner[number])[:count]
        return chosen.summed(dx), dweights[chosen.places]


def route_backward(
    dweights: Float[Tensor, "n top_k"],
    scores: Float[Tensor, "n experts"],
    ids: Int64[Tensor, "n top_k"],
    router: Router,
) -> Float[Tensor, "n experts"]:
    """Return the gradient in a softmax router's scores.

    ``dweights`` is the gradient in the weights of the chosen experts.
    """
    dweights = dweights * router.scale
    if router.normalized:  # the softmax of the chosen scores alone
        weights = scores.float().gather(1, ids).softmax(-1)
        own = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
        return torch.zeros_like(scores).scatter_(1, ids, own.to(scores.dtype))
    values = scores.float().softmax(-1)
    dvalues = torch.zeros_like(values).scatter_(1, ids, dweights)
    return (values * (dvalues - (values * dvalues).sum(-1, keepdim=True))).to(scores.dtype)
