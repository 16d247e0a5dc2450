"""Products of a layer's frozen weight, dense or stored."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from veneer.ops.dispatch import MOST_ROWS_BY_CODES
from veneer.ops.linear.layer import Weight
from veneer.ops.matmul import add_matmul, matmul
from veneer.ops.traced import is_watched


def product(
    x: Float[Tensor, "n i"], read: Float[Tensor, "n i"], weight: Weight, out: Float[Tensor, "n o"] | None = None
) -> Float[Tensor, "n o"]:
    """Return ``W x``, written into ``out`` if it is given. ``read`` is x as `ops.matmul.operand` gives it."""
    weight = _decoded(weight, x)
    if isinstance(weight, Tensor):
        return matmul(read, weight.T, x.dtype, out)
    y = weight.matmul(x)
    if out is not None:
        return out.copy_(y)
    # who watches (selective checkpointing) keeps what it sees, and this is written into
    return y.clone() if is_watched() else y


def add_transposed(
    dx: Float[Tensor, "n i"] | None, dy: Float[Tensor, "n o"], read: Float[Tensor, "n o"], weight: Weight
) -> Float[Tensor, "n i"]:
    """Return ``dx + Wᵀ dy``, written into dx if it is given. ``read`` is dy as `ops.matmul.operand` gives it.

    For a dense weight, the addition is part of the matrix product.
    """
    weight = _decoded(weight, dy)
    if isinstance(weight, Tensor):
        return matmul(read, weight, dy.dtype) if dx is None else add_matmul(dx, read, weight)
    return weight.matmul_t(dy) if dx is None else dx.add_(weight.matmul_t(dy))


def transposed_product(
    dy: Float[Tensor, "n o"], read: Float[Tensor, "n o"], weight: Weight, out: Float[Tensor, "n i"]
) -> Float[Tensor, "n i"]:
    """Return ``Wᵀ dy``, written into ``out``. ``read`` is dy as `ops.matmul.operand` gives it."""
    weight = _decoded(weight, dy)
    return matmul(read, weight, dy.dtype, out) if isinstance(weight, Tensor) else out.copy_(weight.matmul_t(dy))


def _decoded(weight: Weight, rows: Float[Tensor, "n _"]) -> Weight:
    """Return the weight for a product with rows. On a GPU, a stored weight is decoded whole if there are more than
    `MOST_ROWS_BY_CODES` rows.

    It stays as it is if it sets a ``compute_dtype`` other than the rows' dtype, because its own product then converts
    the rows. So it does if ops are watched: selective checkpointing keeps products, and no decoded weight.
    """
    if isinstance(weight, Tensor) or not rows.is_cuda or len(rows) <= MOST_ROWS_BY_CODES or is_watched():
        return weight
    own = getattr(weight, "compute_dtype", None)
    return weight.dense(rows.dtype) if own in (None, rows.dtype) else weight
