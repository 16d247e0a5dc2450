"""Adapter layer by layer: how large each update is, and how many directions it uses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from veneer.analyze.overlap import sign_conflict, subspace_overlap
from veneer.analyze.spectrum import Spectrum


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One module: its path split into block number and name, and the figures of its update."""

    path: str
    layer: int | None
    module: str
    norm: float
    effective_rank: float
    rank: int
    energy: float


@dataclass(frozen=True, slots=True)
class PairReport:
    """Two adapters at one module: shared directions among the top k of each, and entries that pull apart."""

    path: str
    overlap: float
    chance: float
    conflict: float


def describe(spectra: Mapping[str, Spectrum], top: int) -> list[LayerReport]:
    """One line for each module path; ``top``: how many directions ``energy`` counts."""
    lines = []
    for path, spectrum in spectra.items():
        layer, module = split_path(path)
        rank = int((spectrum.s > spectrum.s.max() * 1e-6).sum()) if spectrum.norm else 0
        lines.append(
            LayerReport(path, layer, module, spectrum.norm, spectrum.effective_rank, rank, spectrum.energy(top))
        )
    return lines


def compare(first: Mapping[str, Spectrum], second: Mapping[str, Spectrum], top: int) -> list[PairReport]:
    """One line for each module that both change. ``chance`` is the overlap of random directions."""
    lines = []
    for path in first:
        if path in second:
            a, b = first[path], second[path]
            i, j = min(top, len(a.s)), min(top, len(b.s))
            conflict = sign_conflict(a.u * a.s @ a.vt, b.u * b.s @ b.vt)
            lines.append(PairReport(path, subspace_overlap(a, b, i, j), max(i, j) / a.vt.shape[1], conflict))
    return lines


def split_path(path: str) -> tuple[int | None, str]:
    """``model.layers.3.mlp.up_proj`` → (3, "mlp.up_proj"); a path without a number has no block."""
    match = re.search(r"\.(\d+)\.", path)
    return (int(match.group(1)), path[match.end() :]) if match else (None, path)
