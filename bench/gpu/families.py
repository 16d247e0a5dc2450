"""The cases of `kernels.py` by the kernels that they share, in order of worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from bench.gpu import fused_cases as fused
from bench.gpu import kernel_cases as plain
from bench.gpu.kernel_cases import Case, Maker
from veneer.ops.paged_attention import DTYPES

Made = Callable[[Maker], Case]


def _served(make: Maker, *cases: Made) -> Iterator[Case]:
    """The kernels of pages and pairs have no float16."""
    return (case(make) for case in cases if make.dtype in DTYPES)


def _fused(make: Maker) -> Iterator[Case]:
    for case in (fused.rotation_of_both, fused.norms_of_rows, fused.nested_decode):
        yield case(make)
    yield from _served(make, fused.appended_turned, fused.biased_attention, fused.scaled_pairs)


FAMILIES: dict[str, Callable[[Maker], Iterable[Case]]] = {
    "attention": lambda make: [plain.attention_of_a_batch(make), plain.packed_attention(make)],
    "four_bit": plain.four_bit,
    "norms": lambda make: [*plain.norms(make), *plain.elementwise(make)],
    "head": lambda make: [plain.head(make), plain.dropout(make)],
    "int8": lambda make: [*plain.int8(make), plain.blockwise(make)],
    "pairs": lambda make: [plain.grouped(make), *_served(make, plain.pairs_of_versions)],
    "paged_attention": lambda make: _served(make, plain.of_pages),
    "draws": lambda make: [plain.draws(make)],
    "fused": _fused,
}
