"""Divergence of a student's next-token distributions from a teacher's. Logits exist only for a chunk of tokens at a
time.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.model.fused.deferred import DeferredLogits
from veneer.ops.cross_entropy import CHUNK_BYTES

Sums = tuple[Float[Tensor, ""], Int[Tensor, ""]]


def divergence(
    student: Float[Tensor, "n v"], teacher: Float[Tensor, "n v"], beta: float, temperature: float = 1.0
) -> Float[Tensor, " n"]:
    """Return the generalized Jensen-Shannon divergence of each token in nats, at least in float32, from logits.

    If ``beta`` is 0, it is the forward KL(teacher, student); if 1, the reverse KL(student, teacher); if 0.5, the
    Jensen-Shannon divergence. Logits are divided by ``temperature``.
    Agarwal et al. 2024, arXiv:2306.13649, eq. 1, with TRL's limits at 0 and 1.
    """
    own, other = (_wide(logits / temperature).log_softmax(dim=-1) for logits in (student, teacher))
    if beta == 0:
        return _kl(other, own)
    if beta == 1:
        return _kl(own, other)
    mixed = torch.logaddexp(own + math.log1p(-beta), other + math.log(beta))
    return beta * _kl(other, mixed) + (1 - beta) * _kl(own, mixed)


def summed_divergence(
    student: Float[Tensor, "n v"],
    teacher: Float[Tensor, "n v"],
    labels: Int[Tensor, " n"],
    *,
    beta: float,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Sums:
    """Return the sum of `divergence` over the tokens, and the number of ``labels`` that the student finds most
    probable.

    Deferred logits are computed in chunks of ``chunk_bytes``. No gradient flows to the teacher.
    """
    found: list[Sums] = []
    n_rows = max(1, chunk_bytes // (4 * student.shape[-1]))
    for start in range(0, max(len(labels), 1), n_rows):
        part = slice(start, start + n_rows)
        own, other, told = student[part], teacher[part], labels[part]
        if isinstance(own, DeferredLogits):
            given = (own.hidden, own.pending, other, told, beta, temperature)
            found.append(cast(Sums, _Deferred.apply(*given)))  # type: ignore[no-untyped-call]
        else:
            found.append(_sums(own, other, told, beta, temperature))
    total, hits = zip(*found, strict=True)
    return torch.stack(total).sum(), torch.stack(hits).sum()


class _Deferred(torch.autograd.Function):
    """Autograd function that returns the summed divergence and the number of hits of a chunk of tokens, if the head is
    frozen.

    It computes the gradient in the forward pass, so that no logits are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, pending: Any, teacher: Tensor, labels: Tensor, beta: float, temperature: float
    ) -> Sums:
        learns = bool(ctx.needs_input_grad[0])
        with torch.set_grad_enabled(learns):
            own = hidden.detach().requires_grad_(learns)
            total, hits = _sums(pending.made(own), teacher, labels, beta, temperature)
        if learns:
            ctx.save_for_backward(*torch.autograd.grad(total, own))
        ctx.mark_non_differentiable(hits)
        return total.detach(), hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (own,) = ctx.saved_tensors
        return own * grad.to(own.dtype), None, None, None, None, None


def _sums(student: Tensor, teacher: Tensor, labels: Tensor, beta: float, temperature: float) -> Sums:
    with torch.no_grad():
        made = (teacher.made() if isinstance(teacher, DeferredLogits) else teacher).detach()
    hits = (student.detach().argmax(dim=-1) == labels.to(student.device)).sum()
    return divergence(student, made.to(student.device), beta, temperature).sum(), hits


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p, q) of each row. ``p`` and ``q`` are log-probabilities."""
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(dim=-1)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
