"""The bytes that a process starts with: measured once, of a small run in a process of its own, beside the plan."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from veneer.errors import ConfigError
from veneer.model.memory.available import high_water
from veneer.plan import small_run, start
from veneer.plan.start import start_bytes, start_measured


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    start._beginning.cache_clear()
    yield
    start._beginning.cache_clear()


def begun(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "_COMMAND", (sys.executable, "-c", script))


def test_a_process_is_begun_once_and_what_it_held_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    begun("print('told', 7_000_003)", monkeypatch)
    with start_measured():
        first = start._beginning()
        assert start._beginning() is first
        assert start_bytes() == 7_000_003
    begun("raise SystemExit(3)", monkeypatch)
    with start_measured():
        assert start._beginning.cache_info().currsize == 0
    assert start_bytes() == 7_000_003


def test_another_installation_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    begun("print(7_000_003)", monkeypatch)
    assert start_bytes() == 7_000_003
    monkeypatch.setattr(sys, "prefix", "/another")
    begun("print(5_000_011)", monkeypatch)
    assert start_bytes() == 5_000_011


@pytest.mark.parametrize("kept", ["", "[]", "{}", '{"bytes": "many"}'])
def test_a_file_that_says_nothing_is_written_anew(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun("print(7_000_003)", monkeypatch)
    start._file().parent.mkdir(parents=True)
    start._file().write_text(kept)
    assert start_bytes() == start.known_start() == 7_000_003


@pytest.mark.parametrize("other", ["veneer", "torch", "transformers", "trl"])
def test_other_versions_are_measured_anew(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "version", lambda name: "1.0")
    before = start._file()
    monkeypatch.setattr(start, "version", lambda name: "1.1" if name == other else "1.0")
    assert start._file() != before


@pytest.mark.parametrize("fails", [True, False])
def test_nothing_is_left_of_a_process_that_nobody_waited_for(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the plan fails, and where another process has measured meanwhile."""
    begun("import time; time.sleep(600)", monkeypatch)
    made = []

    def plan() -> None:
        with start_measured():
            made.append(start._beginning())
            if fails:
                raise ConfigError("not planned")
            start._file().parent.mkdir(parents=True)
            start._file().write_text('{"bytes": 7000003}')
            assert start_bytes() == 7_000_003

    with pytest.raises(ConfigError, match="not planned") if fails else nullcontext():
        plan()
    assert made[0].process.returncode is not None
    assert not Path(made[0]._folder.name).exists()
    assert start._beginning.cache_info().currsize == 0


def test_a_process_that_hangs_is_ended_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    begun("import time; time.sleep(600)", monkeypatch)
    monkeypatch.setattr(start, "LONGEST", 0.2)
    with pytest.raises(ConfigError, match="it took more than 0 seconds"):
        start_bytes()


def test_a_cache_that_cannot_be_written_loses_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun("print(7_000_003)", monkeypatch)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "file" / "cache"))
    assert start_bytes() == 7_000_003


def test_modules_beside_the_user_are_not_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('mine')")
    monkeypatch.chdir(tmp_path)
    run = [*start._COMMAND[:2], "-c", "import random, veneer"]
    assert subprocess.run(run, capture_output=True, check=False).returncode == 0


def test_a_process_that_ends_early_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    begun("raise SystemExit('no room')", monkeypatch)
    with pytest.raises(ConfigError, match="a process could not be measured: no room"):
        start_bytes()
    assert not start._file().exists()


def test_it_begins_without_torch() -> None:
    code = "import sys, veneer.plan.start; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_small_run_is_planned_and_then_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = []
    monkeypatch.setattr(sys, "argv", ["small_run", str(tmp_path)])
    monkeypatch.setattr(small_run, "plan_recipe", lambda recipe: done.append(("planned", recipe)))
    monkeypatch.setattr(small_run, "run_recipe", lambda recipe: done.append(("trained", recipe)))
    monkeypatch.setattr(small_run, "high_water", lambda: 7_000_003)
    small_run.main()
    assert [name for name, _ in done] == ["planned", "trained"]
    assert done[0][1] is done[1][1]
    assert Path(done[0][1].output).parent == tmp_path
    assert capsys.readouterr().out == "7000003\n"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/status")
def test_what_starts_has_planned_and_trained_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29999"}.items():
        monkeypatch.setenv(name, value)
    code = "import veneer.train.run; from veneer.model.memory.available import high_water as most; print(most())"
    as_it_begins = [sys.executable, "-c", start._PROGRAM + code]
    bare = int(subprocess.run(as_it_begins, capture_output=True, text=True, check=True).stdout)
    assert bare + 10_000_000 < start_bytes() < bare + 200_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/status")
def test_a_process_that_starts_is_measured_without_what_began_it() -> None:
    held = bytearray(b"x" * 400_000_000)
    run = [sys.executable, "-c", "from veneer.model.memory.available import high_water; print(high_water())"]
    own = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert 10_000_000 < own < len(held) < (high_water() or 0)
