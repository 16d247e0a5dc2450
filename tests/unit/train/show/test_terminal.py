"""Progress of what is no training run."""

from __future__ import annotations

import pytest

from veneer.train.show import terminal


def test_a_pipe_gets_a_plain_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    with terminal.progress_bar("perplexity") as on_progress:
        for done in range(1, 9):
            now += 3.0
            on_progress(done, 8)
    assert capsys.readouterr().err == "perplexity 4/8\nperplexity 8/8\n"
