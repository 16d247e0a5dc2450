"""Experts of a mixture in training: rows sorted by expert, forward and backward in x, the weights and low-rank pairs.

Each expert's rows are one product. The matrices of the experts are frozen. The backward pass keeps the output of the
first layers, (n · top_k, 2 · width), and the A-products of the pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from veneer.ops.experts import Router
from veneer.ops.glu import glu_backward, glu_forward
from veneer.ops.linear.layer import Weight
from veneer.ops.linear.weight import add_transposed, product
from veneer.ops.matmul import add_matmul, matmul, operand
from veneer.ops.traced import Traced
from veneer.records.terms.pair import Pair

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
class ExpertLayers:
    """Frozen linear layer of every expert, and the low-rank ``pair`` that is added to each of them, stacked."""

    weights: Sequence[Weight]
    pair: Pair | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (o, i) of one expert's layer."""
        o, i = self.weights[0].shape
        return o, i

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors that receive gradients: A (experts, r, i) and B (experts, o, r)."""
        return () if self.pair is None else (self.pair.a, self.pair.b)


@dataclass(frozen=True, slots=True)
class KeptOfExperts:
    """Outputs of the first layers, one row a choice, and the A-products of both layers' pairs if there are any."""

    hidden: Float[Tensor, "choices inner"]
    us: tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, slots=True)
class ExpertGradients:
    """Gradients in x, in the weights of the choices, and in the pairs' tensors, those of the first layers in front."""

    x: Float[Tensor, "n d"]
    weights: Float[Tensor, "n top_k"]
    pairs: tuple[Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class TrainedExperts:
    """Gated feed-forward layers of the experts, with the pairs of adapters.

    ``inner`` are gate and up as one matrix, ``down`` the second layers; ``activation`` is applied between them.
    """

    inner: ExpertLayers
    down: ExpertLayers
    activation: str

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors that receive gradients."""
        return (*self.inner.tensors, *self.down.tensors)

    def forward(
        self, x: Float[Tensor, "n d"], chosen: ChosenExperts, weights: Float[Tensor, "n top_k"]
    ) -> tuple[Float[Tensor, "n d"], KeptOfExperts]:
        """Return the weighted sums of the experts' outputs, and the tensors that `backward` reads."""
        n, (d, width) = len(chosen.tokens), self.down.shape
        hidden, out = x.new_empty(n, 2 * width), x.new_empty(n, d)
        first, second = (_Factors.of(layers, x.dtype) for layers in (self.inner, self.down))
        us = tuple(None if own is None else x.new_empty(n, own.rank) for own in (first, second))
        for number, rows, tokens in chosen.each():
            inner = _product(x[tokens], self.inner, number, first, us[0], rows)
            hidden[rows] = inner[: rows.stop - rows.start]
            acted = glu_forward(inner[:, :width], inner[:, width:], self.activation)
            out[rows] = _product(acted, self.down, number, second, us[1], rows)[: rows.stop - rows.start]
        return chosen.summed(out, weights), KeptOfExperts(hidden, (us[0], us[1]))

    def backward(
        self,
        dy: Float[Tensor, "n d"],
        x: Float[Tensor, "n d"],
        kept: KeptOfExperts,
        chosen: ChosenExperts,
        weights: Tensor,
    ) -> ExpertGradients:
        """Return all gradients.

        The gradient in a weight is ⟨downᵀ dy, act(gate) · up⟩, so that the experts' outputs need not be kept.
        """
        width, dtype = self.down.shape[1], dy.dtype
        by_choice = weights.new_empty(weights.numel()).scatter_(0, chosen.places.flatten(), weights.flatten())
        dx, dweights = dy.new_empty(len(chosen.tokens), dy.shape[1]), torch.empty_like(by_choice)
        first, second = (_Factors.of(layers, dtype) for layers in (self.inner, self.down))
        found = _PairGradients(self.inner), _PairGradients(self.down)
        for number, rows, tokens in chosen.each():
            count, own, wide = rows.stop - rows.start, dy[tokens], slice(rows.start, rows.start + len(tokens))
            own[count:] = 0  # rows of other experts, which the pairs' gradients would count
            share = by_choice[wide, None]
            through, du = _transposed(own, self.down, number, second)
            dinner, dacted = kept.hidden[wide].clone(), (through * share).to(dtype)
            _, _, acted = glu_backward(
                dacted, dinner[:, :width], dinner[:, width:], self.activation, owns_dh=True, owns_inputs=True
            )
            dweights[rows] = (through[:count].float() * acted[:count].float()).sum(1)
            if du is not None:
                u = cast(Tensor, kept.us[1])[wide]
                found[1].add(number, (du * share).to(dtype), acted, own, (u * share).to(dtype))
            into, du = _transposed(dinner, self.inner, number, first)
            if du is not None:
                found[0].add(number, du, x[tokens], dinner, cast(Tensor, kept.us[0])[wide])
            dx[rows] = into[:count]
        pairs = (*found[0].listed(), *found[1].listed())
        return ExpertGradients(chosen.summed(dx), dweights[chosen.places], pairs)


@dataclass(frozen=True, slots=True)
class _Factors:
    """Pairs of all experts in the dtype of a pass: A (experts, r, i), and B (experts, o, r) times the scale."""

    a: Tensor
    b: Tensor

    @classmethod
    def of(cls, layers: ExpertLayers, dtype: torch.dtype) -> _Factors | None:
        pair = layers.pair
        return None if pair is None else cls(pair.a.to(dtype), (pair.b * pair.scale).to(dtype).contiguous())

    @property
    def rank(self) -> int:
        return self.a.shape[1]


class _PairGradients:
    """Gradients in the pairs of a layer's experts, in the tensors' own dtypes; zero for experts that no row chose."""

    def __init__(self, layers: ExpertLayers) -> None:
        self.scale = 1.0 if layers.pair is None else layers.pair.scale
        self.values = [
            t.new_zeros(t.shape) if t.requires_grad else None for t in layers.tensors
        ]  # not like B, whose experts lie side by side in PEFT's form

    def add(self, number: int, du: Tensor, x: Tensor, dy: Tensor, u: Tensor) -> None:
        """Set the gradients of one expert from those in its A-product and its output."""
        da, db = self.values
        if da is not None:
            da[number] = matmul(du.T, x, du.dtype)
        if db is not None:
            db[number] = matmul(u.T, dy, u.dtype).T

    def listed(self) -> tuple[Tensor | None, ...]:
        for db in self.values[1:]:
            if db is not None:
                db.mul_(self.scale)
        return tuple(self.values)


def _product(
    x: Tensor, layers: ExpertLayers, number: int, factors: _Factors | None, us: Tensor | None, rows: slice
) -> Tensor:
    """Return an expert's layer applied to rows, and write the A-products of those that are its own into ``us``."""
    read = operand(x)
    y = product(x, read, layers.weights[number])
    if factors is not None and us is not None:
        u = matmul(read, factors.a[number].T, x.dtype)
        add_matmul(y, u, factors.b[number].T)
        us[rows] = u[: rows.stop - rows.start]
    return y


def _transposed(
    dy: Tensor, layers: ExpertLayers, number: int, factors: _Factors | None
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients in the rows that an expert's layer read, and in their A-products if it has a pair."""
    read = operand(dy)
    if factors is None:
        return add_transposed(None, dy, read, layers.weights[number]), None
    du = matmul(read, factors.b[number], dy.dtype)
    return add_transposed(matmul(du, factors.a[number], dy.dtype), dy, read, layers.weights[number]), du


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
