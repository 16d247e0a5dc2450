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
from veneer.ops.glu import unit_backward, unit_forward
from veneer.ops.grouped_low_rank import AdapterRuns, LowRankGroup, Run, add_grouped_low_rank, grouped_low_rank_backward
from veneer.ops.linear.layer import Weight
from veneer.ops.linear.weight import product, transposed_product
from veneer.ops.matmul import operand
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
        """Return the choices ``ids``, sorted by expert. If ``like`` is a tensor without values, as in a traced step,
        all experts are taken to be chosen equally often.
        """
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

    @property
    def runs(self) -> AdapterRuns:
        """Sorted choices as runs of the experts' pairs."""
        each = (Run(number, start, stop) for number, (start, stop) in enumerate(self.bounds) if start < stop)
        return AdapterRuns(tuple(each), len(self.tokens))

    def each(self) -> Iterator[tuple[int, slice, slice]]:
        """Yield each chosen expert: its number, the slice of its choices, and the slice of the choices to compute.

        The latter may run on into the choices of the next experts, so that its length is a multiple of `ROWS_AT_ONCE`.
        What is computed there the next experts write over.
        """
        for number, (start, stop) in enumerate(self.bounds):
            if start < stop:
                yield number, slice(start, stop), slice(start, stop + (start - stop) % ROWS_AT_ONCE)

    def sorted(self, weights: Float[Tensor, "n top_k"]) -> Float[Tensor, "choices 1"]:
        """Return the weight of each choice, in the order of the sorted choices."""
        return weights.new_empty(weights.numel()).scatter_(0, self.places.flatten(), weights.flatten())[:, None]

    def summed(self, rows: Float[Tensor, "choices d"]) -> Float[Tensor, "n d"]:
        """Sum the rows of each token's choices, in the order of choice and in float32."""
        total = rows.new_zeros(len(self.places), rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
        for place in range(self.places.shape[1]):
            total += rows.index_select(0, self.places[:, place])
        return total.to(rows.dtype)


@dataclass(frozen=True, slots=True)
class ExpertLayers:
    """Frozen linear layer of every expert, the low-rank ``pair`` that is added to each of them, stacked, and their
    frozen ``bias`` (experts, o), None if there is none.
    """

    weights: Sequence[Weight]
    pair: Pair | None = None
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (o, i) of one expert's layer."""
        o, i = self.weights[0].shape
        return o, i

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors that receive gradients: A (experts, r, i) and B (experts, o, r)."""
        return () if self.pair is None else (self.pair.a, self.pair.b)

    @property
    def group(self) -> LowRankGroup | None:
        """Low-rank pairs of all experts as one group, in which an expert counts as the adapter of its rows; None if
        there are no pairs.
        """
        pair = self.pair
        if pair is None:
            return None
        return LowRankGroup(pair.a, pair.b, (pair.scale,) * len(pair.b))

    def forward(
        self, x: Float[Tensor, "choices i"], chosen: ChosenExperts, shares: Float[Tensor, "choices 1"] | None = None
    ) -> tuple[Float[Tensor, "choices o"], Tensor | None]:
        """Return the outputs for rows sorted by expert, and their products with A (None without pairs), in the form in
        which `backward` reads them. ``shares`` multiply the bias.
        """
        y, group = x.new_empty(len(x), self.shape[0]), self.group
        for number, rows, wide in chosen.each():
            own = x[wide]
            product(own, operand(own), self.weights[number], y[wide])
            if self.bias is not None:
                y[rows] += self.bias[number] if shares is None else (shares[rows] * self.bias[number]).to(y.dtype)
        return y, None if group is None else add_grouped_low_rank(x, [group], chosen.runs, [y])

    def backward(
        self, dy: Float[Tensor, "choices o"], x: Float[Tensor, "choices i"], u: Tensor | None, chosen: ChosenExperts
    ) -> tuple[Float[Tensor, "choices i"], tuple[Tensor | None, ...]]:
        """Return the gradients in the sorted rows and in `tensors`."""
        dx, group = dy.new_empty(len(dy), self.shape[1]), self.group
        for number, _, wide in chosen.each():
            own = dy[wide]
            transposed_product(own, operand(own), self.weights[number], dx[wide])
        if group is None or u is None:
            return dx, ()
        added, [da], [db] = grouped_low_rank_backward([dy], x, u, [group], chosen.runs)
        each = zip(self.tensors, cast("tuple[Tensor, Tensor]", (da, db)), strict=True)
        found = (own.to(t.dtype) if t.requires_grad else None for t, own in each)
        return dx.add_(cast(Tensor, added)), tuple(found)

    def slopes(self, dy: Float[Tensor, "choices o"], chosen: ChosenExperts) -> Float[Tensor, " choices"] | float:
        """Return the gradient with respect to the shares of the bias, given that of the outputs; 0 without a bias."""
        if self.bias is None:
            return 0.0
        found = dy.new_empty(len(dy), dtype=torch.promote_types(dy.dtype, torch.float32))
        for number, rows, _ in chosen.each():
            found[rows] = dy[rows].to(found.dtype) @ self.bias[number].to(found.dtype)
        return found


@dataclass(frozen=True, slots=True)
class KeptOfExperts:
    """Outputs of the first layers, one row a choice, and the A-products of both layers' pairs if there are any."""

    hidden: Float[Tensor, "choices inner"]
    us: tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, slots=True)
class ExpertGradients:
    """Gradients with respect to x, to the weights of the choices, and to the tensors of the pairs: first the inner
    layers', then the down layers'.
    """

    x: Float[Tensor, "n d"]
    weights: Float[Tensor, "n top_k"]
    pairs: tuple[Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class TrainedExperts:
    """Gated feed-forward layers of the experts, with the pairs of adapters.

    ``inner`` are gate and up as one matrix, ``down`` the second layers. ``activation``, one of `veneer.ops.glu.UNITS`,
    is applied between them.
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
        """Return the weighted sums of the experts' outputs, and the tensors that `backward` reads.

        Weights multiply the inputs and biases of the second layers instead of their outputs, so that the backward pass
        need not keep the outputs.
        """
        hidden, first = self.inner.forward(x.index_select(0, chosen.tokens), chosen)
        acted, share = unit_forward(hidden, self.activation), chosen.sorted(weights)
        out, second = self.down.forward((acted * share).to(x.dtype), chosen, share)
        return chosen.summed(out), KeptOfExperts(hidden, (first, second))

    def backward(
        self,
        dy: Float[Tensor, "n d"],
        x: Float[Tensor, "n d"],
        kept: KeptOfExperts,
        chosen: ChosenExperts,
        weights: Tensor,
    ) -> ExpertGradients:
        """Return all gradients.

        The gradient in a weight is ⟨downᵀ dy, act(gate) · up⟩ + ⟨dy, bias⟩, so that the experts' outputs need not be
        kept.
        """
        share, dtype, dout = chosen.sorted(weights), dy.dtype, dy.index_select(0, chosen.tokens)
        acted = unit_forward(kept.hidden, self.activation)
        through, second = self.down.backward(dout, (acted * share).to(dtype), kept.us[1], chosen)
        dweights = (through.float() * acted.float()).sum(1) + self.down.slopes(dout, chosen)
        dinner, dacted = kept.hidden.clone(), (through * share).to(dtype)
        del through, acted, dout
        unit_backward(dacted, dinner, self.activation)
        dx, first = self.inner.backward(dinner, x.index_select(0, chosen.tokens), kept.us[0], chosen)
        return ExpertGradients(chosen.summed(dx), dweights[chosen.places], (*first, *second))


def route_backward(
    dweights: Float[Tensor, "n top_k"],
    scores: Float[Tensor, "n experts"],
    ids: Int64[Tensor, "n top_k"],
    router: Router,
) -> Float[Tensor, "n experts"]:
    """Return the gradient with respect to a router's scores.

    ``dweights`` is the gradient with respect to the weights of the chosen experts.
    """
    dweights = dweights * router.scale
    if router.values == "sigmoid":
        values = scores.float().gather(1, ids).sigmoid()
        if router.normalized:
            total = values.sum(-1, keepdim=True)
            dweights = (dweights - (values * dweights).sum(-1, keepdim=True) / total) / total
        return torch.zeros_like(scores).scatter_(1, ids, (dweights * values * (1 - values)).to(scores.dtype))
    if router.normalized:  # the softmax of the chosen scores alone
        weights = scores.float().gather(1, ids).softmax(-1)
        own = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
        return torch.zeros_like(scores).scatter_(1, ids, own.to(scores.dtype))
    values = scores.float().softmax(-1)
    dvalues = torch.zeros_like(values).scatter_(1, ids, dweights)
    return (values * (dvalues - (values * dvalues).sum(-1, keepdim=True))).to(scores.dtype)
