"""Rules of every picture: texts stand in the frame, and the names of ticks apart."""

from __future__ import annotations

import itertools
from typing import Any

from matplotlib.figure import Figure
from matplotlib.text import Text


def check_picture(figure: Figure) -> None:
    """A title, nothing cut off, no two names of ticks on each other."""
    figure.canvas.draw()
    frame: Any = figure.bbox
    unseen = [label for axes in figure.axes for label in _out_of_view(axes)]
    for text in figure.findobj(Text):
        if text not in unseen and text.get_visible() and text.get_text().strip():
            box = text.get_window_extent()
            inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= frame.x1 + 1 and box.y1 <= frame.y1 + 1
            assert inside, (text.get_text(), box, frame)
    for axes in figure.axes:
        named = [label for label in axes.get_xticklabels() if label.get_text()]
        boxes = [label.get_window_extent() for label in named]
        assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(boxes)), named
    assert any(axes.get_title() for axes in figure.axes)


def _out_of_view(axes: Any) -> list[Text]:
    """The names of ticks beyond the ends of the axes, which are not drawn."""
    found: list[Text] = []
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if not low <= tick.get_loc() <= high:
                found += [tick.label1, tick.label2]
    return found


def ticks_of(axes: Any) -> list[float]:
    return [float(tick) for tick in axes.get_xticks()]
