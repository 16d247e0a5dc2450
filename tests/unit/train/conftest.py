"""Runs without the picture of their loss, which takes longer to draw than a tiny model takes to train."""

from __future__ import annotations

import pytest

from bare_runs import draw_nothing


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch.setattr)
