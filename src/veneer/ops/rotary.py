"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864): pairs of features rotated by their position's angle."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from veneer.errors import ShapeError
from veneer.ops.dispatch import implementation


def rotate(
    x: Float[Tensor, "b heads t d"],
    cos: Float[Tensor, "#b t half"],
    sin: Float[Tensor, "#b t half"],
    *,
    interleaved: bool = False,
    inverse: bool = False,
    in_place: bool = False,
    backend: str | None = None,
) -> Float[Tensor, "b heads t d"]:
    """Return x rotated by the tables' angles, or back if ``inverse``; each is the backward of the other.

    The first ``2 * half`` features turn; the rest are unchanged. A pair is features j and j + half (the layout of Llama
    and GPT-NeoX), or 2j and 2j + 1 if ``interleaved``. ``cos`` and ``sin`` hold one value per pair: of transformers'
    tables, the first half of the last axis. Computed in float32, rounded once.

    Strides are arbitrary, so a projection's output (b, t, heads, d) can be rotated through its transposed view.
    ``in_place`` overwrites x and returns it. Raises ShapeError if the tables do not fit.
    """
    _check(x, cos, sin)
    kernel = implementation("rotary.rotate", x.device, backend)
    out: Tensor = kernel(x, cos, sin, interleaved, in_place, inverse)
    return out


def rotate_both(
    q: Float[Tensor, "b heads t d"],
    k: Float[Tensor, "b kv_heads t d"],
    cos: Float[Tensor, "#b t half"],
    sin: Float[Tensor, "#b t half"],
    *,
    interleaved: bool = False,
    inverse: bool = False,
    backend: str | None = None,
) -> None:
    """Rotate queries and keys in place, as `rotate` does, on a GPU by one launch. Raises ShapeError."""
    for x in (q, k):
        _check(x, cos, sin)
    if len(q) != len(k):
        raise ShapeError(f"queries and keys must be of one batch; given {len(q)} and {len(k)} sequences")
    implementation("rotary.rotate_both", q.device, backend)(q, k, cos, sin, interleaved, inverse)


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    fits = (
        x.ndim == 4
        and cos.ndim == 3
        and cos.shape == sin.shape
        and cos.shape[0] in (1, x.shape[0])
        and cos.shape[1] == x.shape[2]
        and 2 * cos.shape[2] <= x.shape[3]
    )
    if not fits:
        raise ShapeError(
            f"rotary takes x (b, heads, t, d) with cos and sin (b or 1, t, half), 2 * half <= d; given x "
            f"{tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        )
