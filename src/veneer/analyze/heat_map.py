"""Heat map of an adapter's changes to its base: one square for each module and layer, one panel for each adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from veneer.analyze.report import LayerReport

_OUTSIDE = "–"  # the column of modules outside any layer
_WIDEST = 44  # characters of a title


def draw_norms(adapters: Mapping[str, Sequence[LayerReport]], path: Path) -> None:
    """Write a PNG with one panel for each adapter name, which shows the norms of the adapter's updates. All panels
    share one colour scale.
    """
    norms_figure(adapters).savefig(path, dpi=150)


def norms_figure(adapters: Mapping[str, Sequence[LayerReport]]) -> Figure:
    """Return the figure of `draw_norms`: modules down, layers across, unchanged modules white."""
    lines = [line for of in adapters.values() for line in of]
    modules = list(dict.fromkeys(line.module for line in lines))
    layers: list[int | None] = [None] if any(line.layer is None for line in lines) else []
    layers += range(max((line.layer for line in lines if line.layer is not None), default=-1) + 1)
    largest = max((line.norm for line in lines), default=1.0)
    width, height = 4 + 0.28 * len(layers) + 0.09 * max(map(len, modules)), 1.2 + 0.3 * len(modules)
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(width, max(height * len(adapters) + 0.4, 2.4)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(adapters), squeeze=False)[:, 0]
        for axes, (name, of) in zip(panels, adapters.items(), strict=True):
            image = axes.imshow(_grid(of, modules, layers), aspect="auto", cmap="viridis", vmin=0, vmax=largest)
            axes.set_yticks(range(len(modules)), modules)
            axes.set_xticks(range(len(layers)), [_OUTSIDE if layer is None else layer for layer in layers])
            axes.set_xlabel("layer")
            axes.set_title(name if len(name) <= _WIDEST else f"…{name[-_WIDEST + 1 :]}")
        figure.colorbar(image, ax=panels, label="Frobenius norm")
        figure.suptitle("Norms of the updates")
    return figure


def _grid(lines: Sequence[LayerReport], modules: Sequence[str], layers: Sequence[int | None]) -> list[list[float]]:
    grid = [[math.nan] * len(layers) for _ in modules]
    for line in lines:
        grid[modules.index(line.module)][layers.index(line.layer)] = line.norm
    return grid
