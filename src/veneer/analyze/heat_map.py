"""A picture of where an adapter changed its base: one square a module and layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from veneer.analyze.report import LayerReport


def draw_norms(lines: Sequence[LayerReport], path: Path) -> None:
    """Write a PNG: norms of the updates, modules down, layers across. Modules outside any layer stand in column 0."""
    modules = list(dict.fromkeys(line.module for line in lines))
    n_layers = max((line.layer or 0 for line in lines), default=0) + 1
    grid = [[math.nan] * n_layers for _ in modules]
    for line in lines:
        grid[modules.index(line.module)][line.layer or 0] = line.norm
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(2.5 + 0.28 * n_layers, 1.6 + 0.32 * len(modules)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(grid, aspect="auto", cmap="viridis")
        axes.set_yticks(range(len(modules)), modules)
        axes.set_xlabel("layer")
        axes.set_title("Frobenius norm of each update")
        figure.colorbar(image, ax=axes)
        figure.savefig(path, dpi=150)
