"""Progress of what is no training run."""

from __future__ import annotations

import contextlib
import io
import sys
import time

import pytest

from patience import wait_until
from veneer.plain import progress


def test_a_pipe_gets_a_plain_line_every_five_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.progress_bar("perplexity") as on_progress:
        for done in range(1, 9):
            now += 3.0
            on_progress(done, 8)
    told = [f"perplexity {done}/8, {left} s left\n" for done, left in ((2, 18), (4, 12), (6, 6), (8, 0))]
    assert capsys.readouterr().err == "".join(told)


def test_the_time_left_is_told_when_a_twentieth_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.progress_bar("exporting") as on_progress:
        for done in (1, 2, 13, 14):
            now += 6.0
            on_progress(done, 260)
    told = ["exporting 1/260", "exporting 2/260", "exporting 13/260", "exporting 14/260, 5 min 41 s left"]
    assert capsys.readouterr().err.splitlines() == told


def test_what_is_quick_prints_its_opening_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar("converting", opens_with="converting x.gguf, once") as on_progress:
        on_progress(1, 1)
    assert capsys.readouterr().err == "converting x.gguf, once\n"


def test_the_first_of_several_processes_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with progress.progress_bar("converting", opens_with="converting x.gguf, once"):
        pass
    assert capsys.readouterr().err == ""


def test_a_bar_comes_and_goes_before_one_that_was_opened_first(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", screen)
    with progress.progress_bar("exporting") as outer:
        with progress.progress_bar("converting", opens_with="once") as inner, contextlib.redirect_stderr(io.StringIO()):
            inner(3, 7)
        outer(5, 7)
    shown = screen.getvalue()
    assert 0 <= shown.index("converting") < shown.rindex("converting") < shown.rindex("exporting")
    assert shown.count("━") > 0
    assert shown.rindex("converting") < shown.rindex("━")


def test_a_wait_is_told_with_what_is_waited_for_now(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.01)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    with progress.waits_told("loading torch"):
        appears("loading torch (0 s so far)\n", screen)
        progress.waiting_for("measuring")
        appears("measuring (", screen)
    told = screen.getvalue()
    progress.waiting_for("nothing")
    assert screen.getvalue() == told


def test_a_terminal_shows_a_wait_at_once_and_erases_it(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, piped = io.StringIO(), io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr("sys.stdout", piped)
    with progress.waits_told("loading [a]"):
        assert "loading [a]" in screen.getvalue()
        print("an answer")
        print("a note", file=sys.stderr)
        with progress.waits_told("packing"):
            pass
        progress.waiting_over()
        over = screen.getvalue()
        progress.waiting_for("nothing")
    assert (piped.getvalue(), screen.getvalue()) == ("an answer\n", over)
    assert "a note\n" in over
    assert over.endswith("\x1b[2K")


def test_a_wait_inside_of_another_is_named_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.01)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    with progress.waits_told("loading"):
        with progress.waits_told("packing"):
            appears("packing (", screen)
        screen.truncate(0)
        appears("loading (", screen)


def test_a_line_of_a_wait_is_put_off_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.01)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    with progress.waits_told("loading"):
        appears("loading (", screen)
        progress.waiting_anew("saving")
        appears("saving (", screen)
        progress.waiting_heard(3600.0)
        told = screen.getvalue().count("\n")
        time.sleep(0.1)
        assert screen.getvalue().count("\n") <= told + 1  # a line that was on its way


def test_a_short_wait_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.waits_told("loading torch"):
        progress.waiting_for("measuring")
    assert capsys.readouterr().err == ""


def appears(line: str, screen: io.StringIO) -> None:
    """Wait until a screen shows a line."""
    wait_until(lambda: line in screen.getvalue())


def test_a_wait_goes_on_behind_a_bar_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.01)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    with progress.waits_told("loading"):
        wait_until(lambda: "loading" in screen.getvalue())
        with progress.progress_bar("converting", opens_with="converting x.gguf, once") as on_progress:
            on_progress(1, 2)
            told = screen.getvalue().count("loading")
            with progress.progress_bar("inner", opens_with="inner"):
                pass
            assert screen.getvalue().count("loading") <= told + 1  # a line that was on its way
        wait_until(lambda: screen.getvalue().count("loading") > told + 1)
        progress.waiting_over()
        told = screen.getvalue()
        with progress.progress_bar("again", opens_with="again"):
            pass
    assert screen.getvalue() == told + "again\n"
