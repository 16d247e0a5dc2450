"""Report on an adapter layer by layer: the size of each update, and its number of directions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from veneer.analyze.overlap import sign_conflict, subspace_overlap
from veneer.analyze.spectrum import Spectrum
from veneer.model.blueprint.names import ELSEWHERE, TASK_HEADS

_IN_BLOCK = tuple(dict.fromkeys(name for names in ELSEWHERE.values() for name in names))
_HEADS = frozenset(("lm_head", "embed_out", *(name for names in TASK_HEADS.values() for name in names)))


@dataclass(frozen=True, slots=True)
class LayerReport:
    """Report on one module: its path, split into block number and name, and the figures of its update."""

    path: str
    layer: int | None
    module: str
    norm: float
    effective_rank: float
    rank: int
    energy: float


@dataclass(frozen=True, slots=True)
class PairReport:
    """Comparison of two adapters at one module: the overlap of their top directions, and the share of opposite signs.

    ``chance`` is the overlap that random directions would have.
    """

    path: str
    overlap: float
    chance: float
    conflict: float


def describe(spectra: Mapping[str, Spectrum], top: int) -> list[LayerReport]:
    """Return one report for each module path, in the order of `split_path` and of a block's layers.

    ``top``: the number of directions in ``energy``.
    """
    lines = []
    for path in sorted(spectra, key=_place):
        found = spectra[path]
        layer, module = split_path(path)
        lines.append(LayerReport(path, layer, module, found.norm, found.effective_rank, found.rank, found.energy(top)))
    return lines


def compare(first: Mapping[str, Spectrum], second: Mapping[str, Spectrum], top: int) -> list[PairReport]:
    """Return one report for each module that both adapters change. ``chance`` is the overlap of random directions."""
    lines = []
    for path in sorted(first, key=_place):
        if path in second:
            a, b = first[path], second[path]
            i, j = min(top, len(a.s)), min(top, len(b.s))
            conflict = sign_conflict(a.u * a.s @ a.vt, b.u * b.s @ b.vt)
            lines.append(PairReport(path, subspace_overlap(a, b, i, j), max(i, j) / a.vt.shape[1], conflict))
    return lines


def split_path(path: str) -> tuple[int | None, str]:
    """Split ``model.layers.3.mlp.up_proj`` into (3, "mlp.up_proj"). A path without a number has no block."""
    match = re.search(r"\.(\d+)\.", path)
    return (int(match.group(1)), path[match.end() :]) if match else (None, path)


def _place(path: str) -> tuple[bool, bool, bool, str, int, int, str]:
    """Return a key that sorts modules in the model's order, because a file lists them in another order.

    Blocks are sorted by stack (decoders last), then by number. Layers of a block are sorted by role, then by name.
    """
    layer, module = split_path(path)
    stack = path.removesuffix(module).removesuffix(f"{layer}.")
    ends = (i for i, name in enumerate(_IN_BLOCK) if f".{module}".endswith(f".{name}"))
    head = layer is None and not _HEADS.isdisjoint(path.split("."))
    return head, layer is not None, "decoder" in stack, stack, layer or 0, next(ends, len(_IN_BLOCK)), module
