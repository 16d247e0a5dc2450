"""Runs without the picture of their loss, which takes longer to draw than a tiny model takes to train."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.train.run.draw_loss", lambda history, path: None)
