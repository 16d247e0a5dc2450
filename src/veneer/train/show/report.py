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
    """Return facts about the machine, and versions of packages, on which a run's numbers depend."""
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
    """Draw a run's training loss, and its held-out loss if there is one, over the steps, as a PNG.

    Rewards, if there are any, are drawn above them.
    """
    drawn = "Reward and loss" if any("reward" in line for line in history) else "Loss"
    loss_figure(history, f"{drawn} of {path.parent}").savefig(path)


def loss_figure(history: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Return the figure that `draw_loss` saves."""
    # Here, as it takes a second to import: no run waits for its picture before the first step.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rewarded = any("reward" in line for line in history)
    figure = Figure(figsize=(7, 6 if rewarded else 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    drawn = [("reward", "reward of an answer")] if rewarded else []
    drawn.append(("loss", "loss (nats for each trained token)"))
    for at, (key, label) in enumerate(drawn, 1):
        axes = figure.add_subplot(len(drawn), 1, at)
        _draw(axes, history, key, label)
        if at == 1:
            axes.set_title(_end_of(title), fontsize="medium")
    axes.set_xlabel("optimizer step")
    return figure


def _draw(axes: Any, history: Sequence[Mapping[str, Any]], key: str, label: str) -> None:
    """Draw the training curve of ``key`` over the steps, and the held-out one."""
    from matplotlib.ticker import MaxNLocator  # as above

    for name, told, style in ((key, "training", "-"), (f"eval_{key}", "held out", "o-")):
        points = [(line["step"], line[name]) for line in history if name in line]
        if points:
            # a line of one point is no line
            axes.plot(*zip(*points, strict=True), style if points[1:] else "o", label=told, markersize=4, linewidth=1.5)
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)


def _end_of(title: str) -> str:
    """Shorten a title; a long path keeps its end."""
    return title if len(title) <= _WIDEST else f"…{title[-_WIDEST + 1 :]}"
