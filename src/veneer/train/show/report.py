"""Report of a run: the environment for ``run.json``, and a picture of the loss."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGES = ("veneer", "torch", "transformers", "trl", "accelerate", "datasets", "safetensors", "numpy")
_WIDEST = 80  # characters of a title


def environment() -> dict[str, Any]:
    """Return the machine and the versions that a run's numbers depend on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def draw_loss(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the training loss and, if there is one, the held-out loss over the steps, as a PNG in the folder
    of a run.
    """
    loss_figure(history, f"Loss of {path.parent}").savefig(path)


def loss_figure(history: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Return the picture of `draw_loss`."""
    # Here, as it takes a second to import: no run waits for its picture before the first step.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(line["step"], line[key]) for line in history if key in line]
        if points:
            # a line of one point is no line
            axes.plot(
                *zip(*points, strict=True), style if points[1:] else "o", label=label, markersize=4, linewidth=1.5
            )
    axes.set_title(_end_of(title), fontsize="medium")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats for each trained token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)
    return figure


def _end_of(title: str) -> str:
    """A title that fits: a long path keeps its end."""
    return title if len(title) <= _WIDEST else f"…{title[-_WIDEST + 1 :]}"
