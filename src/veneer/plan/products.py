"""Matrix products by shape, and those that kernels compute, by the arguments of their calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.ops.cpu.module import DTYPES
from veneer.ops.terms import TERM_KINDS


@dataclass(frozen=True, slots=True)
class MatrixProduct:
    """Matrix product ``(m, k) · (k, n)``, ``batch`` of them."""

    m: int
    k: int
    n: int
    dtype: str
    batch: int = 1

    @property
    def flops(self) -> float:
        """FLOPs, two for each multiply-add."""
        return 2.0 * self.batch * self.m * self.k * self.n


_SCANS = {"scan_forward": 4, "scan_backward": 10}
"""Products of a token with a head's state in the kernels of csrc/scan; those within a chunk count as a part of one."""


def kernel_products(name: str, arguments: tuple[Any, ...]) -> list[MatrixProduct]:
    """Return the matrix products that do the same work as a call of a kernel. Return none for kernels that are not
    listed here.

    Listed are the kernels that apply linear maps or low-rank pairs to rows, compute a map's matrix, or scan.
    """
    if name == "terms_map":
        form, _, n = arguments[:3]
        return list(_of_form(form, n))
    if name == "terms_gradients":
        form, n = arguments[:2]
        return list(_of_form(form, n)) * (2 if TERM_KINDS[form[0]] == "kronecker" else 1)  # one for each factor
    if name in ("terms_entries", "terms_entry_gradients"):
        o, i, r = arguments[0][1:4]
        return [MatrixProduct(o, r, i, "float32")] * (2 if name == "terms_entry_gradients" else 1)
    if name in ("grouped_low_rank_forward", "grouped_low_rank_backward"):
        return list(_of_pairs(arguments, backward=name.endswith("backward")))
    if name in _SCANS:
        (_, heads, k_width, v_width, _), bounds = arguments[:2]
        return [MatrixProduct(bounds[-1], k_width, _SCANS[name] * v_width, "float32", heads)]
    return []


def _of_form(form: Sequence[int], n: int) -> Iterator[MatrixProduct]:
    """Yield the float32 matrix products for n rows of one term of an update.

    ``form`` holds the numbers of the term's kind and sizes, in the order of ``form_at`` in csrc/terms/bindings.cpp. A
    sparse matrix counts as a dense product of as many multiplications, at the same rate.
    """
    kind, sizes, n_places = TERM_KINDS[form[0]], form[1:5], form[-1]
    if kind == "blocks":
        k, b = sizes[:2]
        yield MatrixProduct(n, b, b, "float32", k)
    elif kind == "sparse":
        yield MatrixProduct(n, max(1, round(n_places / sizes[0])), sizes[0], "float32")
    elif kind == "kronecker":
        o1, i1, o2, i2 = sizes
        yield MatrixProduct(n * i1, i2, o2, "float32")
        yield MatrixProduct(n * o2, i1, o1, "float32")


def _of_pairs(arguments: tuple[Any, ...], *, backward: bool) -> Iterator[MatrixProduct]:
    """Yield the matrix products of low-rank pairs. ``arguments`` are those of ``Given`` in
    csrc/grouped_low_rank/bindings.cpp.

    If ``backward``, the products of the gradient with respect to x are always counted, because a traced call does not
    show whether they are needed.
    """
    dtypes, i, outs, pairs, _, _, runs = arguments[:7]
    dtype = next(str(kind).removeprefix("torch.") for kind, number in DTYPES.items() if number == dtypes[0])
    n_adapters = len(pairs) // 3 // len(outs)
    for k, start, stop in zip(runs[::3], runs[1::3], runs[2::3], strict=True):
        n = stop - start
        ranks = [pairs[3 * (layer * n_adapters + k) + 2] for layer in range(len(outs))]
        if not any(ranks):
            continue
        yield MatrixProduct(n, i, sum(ranks), dtype)
        yield from (MatrixProduct(n, r, o, dtype) for r, o in zip(ranks, outs, strict=True) if r)
        if backward:
            yield MatrixProduct(sum(ranks), n, i, dtype)
            yield from (MatrixProduct(o, n, r, dtype) for r, o in zip(ranks, outs, strict=True) if r)
