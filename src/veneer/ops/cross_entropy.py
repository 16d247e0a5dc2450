"""Language-model head and its loss in one op: logits exist for a chunk of rows at a time, never for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.errors import ConfigError, ShapeError
from veneer.ops.dispatch import implementation
from veneer.ops.matmul import add_matmul, matmul, operand, widens
from veneer.ops.traced import row_slices
from veneer.records.frozen import FrozenWeight

_OP = "cross_entropy.softmax_cross_entropy"
# Of logits at a time: rows enough for the products to run at full rate, few enough to stay in cache.
CHUNK_BYTES = 32 << 20
_WIDENED_BYTES = 32 << 20  # of a head at a time, where products are in float32: a whole copy is twice the head
_DETAIL_ROWS = 8
# On a GPU a launch costs more than a cache saves: the head is read once for a chunk, of whole tiles of rows.
_GPU_ROWS, _GPU_TILE, _GPU_DETAIL_ROWS = 1024, 256, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOptions:
    """Settings that turn logits into a loss. Rows with ``ignore_index`` do not count.

    The head's outputs are multiplied by ``scale`` (Cohere, Granite), then capped: ``softcap`` is Gemma 2's c of
    ``c * tanh(logits / c)``. The sum of the rows' losses is divided by ``num_items`` or, if it is None, by the number
    of rows that count. At most ``chunk_bytes`` of logits are held at a time. If it is None, the limit is 32 MiB, but on
    a GPU a chunk has at least 1,024 rows. ``observe`` is called with each chunk of logits.
    """

    ignore_index: int = -100
    scale: float = 1.0
    softcap: float | None = None
    num_items: Tensor | float | None = None
    chunk_bytes: int | None = None
    count_hits: bool = False
    observe: Callable[[slice, Tensor], None] | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and self.softcap <= 0:
            raise ConfigError(f"softcap={self.softcap} must be positive, or None for no cap")


def linear_cross_entropy(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"] | FrozenWeight,
    labels: Int[Tensor, " n"],
    bias: Float[Tensor, " v"] | None = None,
    options: HeadOptions = HeadOptions(),
) -> Float[Tensor, ""]:
    """Return ``cross_entropy(hidden Wᵀ + bias, labels)`` in float32; labels are already shifted.

    Logits are rounded to hidden's dtype, as the head's own product rounds them; softmax and loss are float32. The
    gradient in hidden is computed in the forward pass, chunk by chunk, and only scaled in the backward. This is the
    scheme of Wijmans et al. 2024 (arXiv 2411.09009) and of Hsu et al. 2024 (arXiv 2410.10989). Rows that do not count
    cost nothing.

    The weight receives a gradient if it is a tensor that requires one; bias is frozen. If no row counts and
    ``num_items`` is None, the loss is nan, as torch's is.

    Raises ShapeError if shapes do not fit, or if a label that counts is no class. On CUDA such a label is a failed
    assertion of the device, as in torch, since checking it would wait for the device.
    """
    out_features, in_features = weight.shape
    if hidden.ndim != 2 or labels.shape != hidden.shape[:1] or hidden.shape[1] != in_features:
        raise ShapeError(
            f"linear_cross_entropy takes hidden (n, d), weight (v, d), labels (n,); given "
            f"hidden {tuple(hidden.shape)}, "
            f"weight {(out_features, in_features)}, labels {tuple(labels.shape)}. "
            "Flatten the batch and shift the labels first."
        )
    tensor = weight if isinstance(weight, Tensor) else None
    loss: Tensor = _LinearCrossEntropy.apply(hidden, tensor, weight, labels, bias, options)[0]  # type: ignore[no-untyped-call]
    return loss


def linear_cross_entropy_and_hits(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"] | FrozenWeight,
    labels: Int[Tensor, " n"],
    bias: Float[Tensor, " v"] | None = None,
    options: HeadOptions = HeadOptions(),
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Return `linear_cross_entropy` with a frozen head, and the number of counted rows whose label has the
    top logit.
    """
    weight = weight.detach() if isinstance(weight, Tensor) else weight
    options = replace(options, count_hits=True)
    loss, hits = _LinearCrossEntropy.apply(hidden, None, weight, labels, bias, options)  # type: ignore[no-untyped-call]
    return loss, hits


def linear_cross_entropy_rows(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"] | FrozenWeight,
    labels: Int[Tensor, " n"],
    bias: Float[Tensor, " v"] | None = None,
    options: HeadOptions = HeadOptions(),
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """Return the loss of each row under a frozen head, and whether its label has the top logit.

    It computes as `linear_cross_entropy` does, but ``num_items`` is ignored. The loss of a row that does not count is
    0.
    """
    weight = weight.detach() if isinstance(weight, Tensor) else weight
    options = replace(options, count_hits=True)
    losses, hits = _RowCrossEntropy.apply(hidden, weight, labels, bias, options)  # type: ignore[no-untyped-call]
    return losses, hits


@dataclass(frozen=True, slots=True)
class LabelScores:
    """Scores of each row's label: ``log_probs`` in nats, and further details if asked for.

    ``entropy`` is the entropy of the row's softmax, and ``log_sum_sq_probs`` the log of the sum of the softmax's
    squared probabilities. ``is_top1``: the label has the top logit. Rows whose label does not count have 0.
    """

    log_probs: Float[Tensor, "*n"]
    entropy: Float[Tensor, "*n"] | None = None
    log_sum_sq_probs: Float[Tensor, "*n"] | None = None
    mean_logits: Float[Tensor, "*n"] | None = None
    is_top1: Bool[Tensor, "*n"] | None = None


def linear_token_scores(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"] | FrozenWeight,
    labels: Int[Tensor, " n"],
    bias: Float[Tensor, " v"] | None = None,
    options: HeadOptions = HeadOptions(),
    *,
    details: bool = True,
    collision: bool = False,
    entropy_learns: bool = False,
) -> LabelScores:
    """Return the log-probability of each row's label under a frozen head.

    The gradient with respect to hidden is computed as in `linear_cross_entropy`. Of ``options``, ``scale`` and
    ``softcap`` apply. If ``details``, the other scores of `LabelScores` are returned too, without gradients;
    ``log_sum_sq_probs`` only if ``collision`` as well. With ``entropy_learns`` the entropy has a gradient, for which
    the backward pass computes each chunk of logits again. Raises ShapeError as `linear_cross_entropy` does.
    """
    weight = weight.detach() if isinstance(weight, Tensor) else weight
    options = replace(options, count_hits=details)
    if not details:
        return LabelScores(-_RowCrossEntropy.apply(hidden, weight, labels, bias, options)[0])  # type: ignore[no-untyped-call]
    seen = _Details(labels, hidden.device, collision)
    losses, hits = _RowCrossEntropy.apply(hidden, weight, labels, bias, replace(options, observe=seen))  # type: ignore[no-untyped-call]
    entropy = seen.entropy
    if entropy_learns:
        entropy = _Entropy.apply(hidden, entropy, weight, labels, bias, options)  # type: ignore[no-untyped-call]
    return LabelScores(-losses, entropy, seen.log_sum_sq_probs, seen.mean_logits, hits)


class _Details:
    """Collector of each counted row's entropy, mean logit and, if ``collision``, sum of squared probabilities, from
    chunks of logits.

    Rows count unless their label in ``labels`` is the ignored index.
    """

    def __init__(self, labels: Tensor, device: torch.device, collision: bool) -> None:
        self._rows = (labels != HeadOptions().ignore_index).nonzero()[:, 0]
        self.entropy, self.mean_logits = torch.zeros(2, len(labels), device=device)
        self.log_sum_sq_probs = torch.zeros(len(labels), device=device) if collision else None

    def __call__(self, rows: slice, logits: Tensor) -> None:
        """Compute the details of a chunk of logits (k, v). It belongs to the counted rows with the indices ``rows``."""
        step = _GPU_DETAIL_ROWS if logits.is_cuda else _DETAIL_ROWS  # float32 copies of few rows stay in cache
        for start in range(0, len(logits), step):
            wide = logits[start : start + step].float()
            at = self._rows[rows.start + start : rows.start + start + len(wide)]
            self.mean_logits[at] = wide.mean(dim=-1)
            shifted = wide.sub_(wide.amax(dim=-1, keepdim=True))
            e = shifted.exp()
            total = e.sum(dim=-1)
            self.entropy[at] = total.log() - torch.linalg.vecdot(e, shifted) / total
            if self.log_sum_sq_probs is not None:
                self.log_sum_sq_probs[at] = torch.linalg.vecdot(e, e).log() - 2 * total.log()


def softmax_cross_entropy(
    logits: Float[Tensor, "n v"],
    labels: Int[Tensor, " n"],
    softcap: float | None = None,
    *,
    write_grad: bool = True,
    backend: str | None = None,
) -> Float[Tensor, " n"]:
    """Return the losses of all rows (float32); ``write_grad`` overwrites the logits with each row's gradient.

    Raises ShapeError if labels do not fit or one is no class, ``0`` to ``v - 1``. On CUDA such a label is a failed
    assertion of the device, as in torch.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ShapeError(
            f"logits (n, v) go with labels (n,); given {tuple(logits.shape)} and {tuple(labels.shape)}. Flatten the "
            "batch first"
        )
    _check_classes(labels, logits.shape[1])
    losses: Tensor = implementation(_OP, logits.device, backend)(logits, labels, softcap, write_grad)
    return losses


def _check_classes(labels: Tensor, n_classes: int) -> None:
    if not len(labels):
        return
    if labels.device.type == "cuda":
        inside = ((labels >= 0) & (labels < n_classes)).all()
        torch._assert_async(inside, f"a label that counts is none of the classes 0 to {n_classes - 1}")
        return
    low, high = (int(bound) for bound in torch.aminmax(labels))
    if low < 0 or high >= n_classes:
        raise ShapeError(
            f"labels reach from {low} to {high}, but the head has the classes 0 to {n_classes - 1}. Give labels in "
            "this range, and the ignored index (-100) for positions without a label."
        )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        tensor: Tensor | None,
        weight: Tensor | FrozenWeight,
        labels: Tensor,
        bias: Tensor | None,
        options: HeadOptions,
    ) -> tuple[Tensor, Tensor]:
        rows = (labels != options.ignore_index).nonzero()[:, 0]
        whole = len(rows) == len(labels)
        counted = (hidden, labels) if whole else (hidden[rows], labels[rows])
        wanted = ctx.needs_input_grad[:2]
        (losses, right), dhidden, dweight = _chunked(counted, weight, bias, options, wanted)
        total, hits = losses.sum(), right.sum()
        n_items = len(rows) if options.num_items is None else options.num_items
        if dhidden is not None and not whole:
            dhidden = torch.zeros_like(hidden).index_copy_(0, rows, dhidden)
        ctx.grads = (dhidden, dweight)
        ctx.n_items, ctx.dtype = n_items, hidden.dtype
        ctx.mark_non_differentiable(hits)
        return total / n_items, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, dhits: Tensor) -> tuple[Tensor | None, ...]:
        factor = dloss / ctx.n_items
        dhidden, dweight = (None if g is None else _times(g, factor, ctx.dtype) for g in ctx.grads)
        return dhidden, dweight, None, None, None, None


class _RowCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | FrozenWeight,
        labels: Tensor,
        bias: Tensor | None,
        options: HeadOptions,
    ) -> tuple[Tensor, Tensor]:
        rows = (labels != options.ignore_index).nonzero()[:, 0]
        wanted = ctx.needs_input_grad[0], False
        (losses, right), dhidden, _ = _chunked((hidden[rows], labels[rows]), weight, bias, options, wanted)
        if dhidden is not None:
            dhidden = torch.zeros_like(hidden).index_copy_(0, rows, dhidden)
        ctx.dhidden = dhidden
        hits = torch.zeros_like(labels, dtype=torch.bool).index_copy_(0, rows, right)
        ctx.mark_non_differentiable(hits)
        return losses.new_zeros(len(labels)).index_copy_(0, rows, losses), hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor, dhits: Tensor) -> tuple[Tensor | None, ...]:
        return _times(ctx.dhidden, dlosses[:, None], ctx.dhidden.dtype), None, None, None, None


class _Entropy(torch.autograd.Function):
    """Function that returns the given entropies with a gradient. Its backward pass, seldom needed, computes the logits
    again in chunks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        entropy: Tensor,
        weight: Tensor | FrozenWeight,
        labels: Tensor,
        bias: Tensor | None,
        options: HeadOptions,
    ) -> Tensor:
        ctx.save_for_backward(hidden, entropy, labels)
        ctx.head = weight, bias, options
        return entropy.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dentropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, entropy, labels = ctx.saved_tensors
        weight, bias, options = ctx.head
        rows = (labels != options.ignore_index).nonzero()[:, 0]
        dhidden, out = hidden.new_empty(len(rows), hidden.shape[1]), torch.zeros_like(hidden)
        size = max(1, chunk_rows(weight.shape[0] * hidden.element_size(), hidden.device, options))
        buffer = _buffer(hidden, weight, min(size, len(rows)))
        for part in row_slices(len(rows), size):
            own = rows[part]
            logits = _logits(hidden[own], weight, bias, buffer)
            dlogits = _entropy_gradient(logits, entropy[own, None], options) * dentropy[own, None]
            _project_back(logits.copy_(dlogits), weight, dhidden[part])
        return out.index_copy_(0, rows, dhidden), None, None, None, None, None


def _entropy_gradient(raw: Tensor, entropy: Tensor, options: HeadOptions) -> Tensor:
    """Return the gradient of each row's entropy with respect to the head's outputs: -p (log p + H), times the scale and
    the soft cap's slope.
    """
    logits = raw.to(torch.promote_types(raw.dtype, torch.float32)) * options.scale
    cap = options.softcap
    logits = logits if cap is None else _capped(logits, cap)
    log_p = logits.log_softmax(dim=-1)
    gradient = log_p.exp().mul_(log_p.add_(entropy)).mul_(-options.scale)
    return gradient if cap is None else gradient.mul_(1 - (logits / cap).square_())


def _times(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``gradient * factor`` in ``dtype``, rounded once. A factor 1/n that is rounded to bfloat16 first would put
    every gradient off by 0.4%.
    """
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return (gradient.to(wide) * factor).to(dtype)


def _chunked(
    counted: tuple[Tensor, Tensor],
    weight: Tensor | FrozenWeight,
    bias: Tensor | None,
    options: HeadOptions,
    wanted: tuple[bool, bool],
) -> tuple[tuple[Tensor, Tensor], Tensor | None, Tensor | None]:
    """Return three things: the pair of losses and hits of the rows, and the gradients of the sum of losses with respect
    to hidden and to the weight.

    ``counted`` are the hidden states and labels of the rows that count. If ``options.count_hits``, hits mark the rows
    whose label has the top logit. ``wanted`` says which of the two gradients are computed; the weight's is in float32.
    """
    hidden, labels = counted
    n, out_features = hidden.shape[0], weight.shape[0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    dhidden = torch.empty_like(hidden) if wanted[0] else None
    dweight = hidden.new_zeros(tuple(weight.shape), dtype=wide) if wanted[1] else None
    chunk = max(1, min(n, chunk_rows(out_features * hidden.element_size(), hidden.device, options)))
    buffer = _buffer(hidden, weight, chunk)
    losses, hits = hidden.new_empty(n, dtype=wide), torch.zeros_like(labels, dtype=torch.bool)
    for rows in row_slices(n, chunk):
        logits = _logits(hidden[rows], weight, bias, buffer)
        logits = logits if options.scale == 1 else logits.mul_(options.scale)
        if options.count_hits:
            hits[rows] = logits.argmax(dim=-1) == labels[rows]
        if options.observe is not None:
            options.observe(rows, logits if options.softcap is None else _capped(logits, options.softcap))
        losses[rows] = softmax_cross_entropy(
            logits, labels[rows], options.softcap, write_grad=any(wanted), backend=options.backend
        )
        if any(wanted) and options.scale != 1:
            logits.mul_(options.scale)
        if dhidden is not None:
            _project_back(logits, weight, dhidden[rows])
        if dweight is not None:
            dweight += matmul(logits.T, hidden[rows], wide)
        del logits  # before the next chunk is made
    return (losses, hits), dhidden, dweight


def _capped(logits: Tensor, softcap: float) -> Tensor:
    return (logits / softcap).tanh_().mul_(softcap)


def chunk_rows(row_bytes: int, device: torch.device, options: HeadOptions = HeadOptions()) -> int:
    """Return the number of rows of logits, of ``row_bytes`` each, that are held at a time."""
    rows = (CHUNK_BYTES if options.chunk_bytes is None else options.chunk_bytes) // row_bytes
    by_tiles = device.type == "cuda" and options.chunk_bytes is None
    return max(_GPU_ROWS, rows - rows % _GPU_TILE) if by_tiles else rows


def _buffer(hidden: Tensor, weight: Tensor | FrozenWeight, rows: int) -> Tensor:
    """Allocate memory (rows, v) for a chunk of logits. For a coded weight it has no rows, because the weight's product
    allocates its own output.
    """
    return hidden.new_empty(rows if isinstance(weight, Tensor) else 0, weight.shape[0])


def _logits(hidden: Tensor, weight: Tensor | FrozenWeight, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """Return the logits (n, v) of a chunk of hidden states. If the weight is a tensor, the buffer holds them, because
    new memory pages for each chunk cost time.
    """
    if isinstance(weight, Tensor):
        logits, read = buffer[: hidden.shape[0]], operand(hidden)
        for part in _parts(weight):
            matmul(read, operand(weight[part]).T, hidden.dtype, out=logits[:, part])
    else:
        logits = weight.matmul(hidden)
    return logits if bias is None else logits.add_(bias)


def _project_back(dlogits: Tensor, weight: Tensor | FrozenWeight, out: Tensor) -> None:
    if not isinstance(weight, Tensor):
        out.copy_(weight.matmul_t(dlogits))
    elif len(parts := _parts(weight)) == 1:
        matmul(dlogits, weight, out.dtype, out=out)
    else:
        total = out.new_zeros(out.shape, dtype=torch.float32)
        for part in parts:
            add_matmul(total, dlogits[:, part], operand(weight[part]))
        out.copy_(total)


def _parts(weight: Float[Tensor, "v d"]) -> list[slice]:
    """Return the slices of classes that are multiplied one at a time: one slice of all classes, or several if the CPU
    widens the weight to float32.
    """
    n_classes, width = weight.shape
    size = max(1, _WIDENED_BYTES // (4 * width)) if widens(weight, weight.dtype) else n_classes
    return [slice(start, min(n_classes, start + size)) for start in range(0, n_classes, size)]
