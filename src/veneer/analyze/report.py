"""Report on an adapter layer by layer: the size of each update, and its number of directions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from veneer.analyze.overlap import sign_conflict, subspace_overlap
from veneer.analyze.spectrum import Spectrum


@dataclass(frozen=True, slots=True)
class LayerReport:
    """Report on one module: its path split into block number and name, and its update's figures."""

    path: str
    layer: int | None
    module: str
    norm: float
    effective_rank: float
    rank: int
    energy: float


@dataclass(frozen=True, slots=True)
class PairReport:
    """Comparison of two adapters at one module: shared directions among the top k of each, entries of opposite sign."""

    path: str
    overlap: float
    chance: float
    conflict: float


def describe(spectra: Mapping[str, Spectrum], top: int) -> list[LayerReport]:
    """Return one line for each module path. ``top``: the number of directions in ``energy``."""
    lines = []
    for path, spectrum in spectra.items():
        layer, module = split_path(path)
        rank = int((spectrum.s > spectrum.s.max() * 1e-6).sum()) if spectrum.norm else 0
        lines.append(
            LayerReport(path, layer, module, spectrum.norm, spectrum.effective_rank, rank, spectrum.energy(top))
        )
    return lines


def compare(first: Mapping[str, Spectrum], second: Mapping[str, Spectrum], top: int) -> list[PairReport]:
    """Return one line for each module that both change. ``chance`` is the overlap of random directions."""
    lines = []
    for path in first:
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
