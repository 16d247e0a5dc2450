"""bench/report.py and engine.py: rows as they are measured, kept results, engines that end as they should."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench import report
from patience import PATIENCE, wait_until

ROOT = Path(__file__).parents[3]


def test_a_row_is_printed_when_it_is_added(capsys):
    rows = report.Rows(["one", "a longer name"], ("ms", "ratio to it"))
    rows.add("one", "3.5", "2.0x")
    head, line = capsys.readouterr().out.splitlines()
    assert head == "                     ms  ratio to it"
    assert line == "one                 3.5         2.0x"
    rows.add("a longer name", "0.25", "17x")
    assert capsys.readouterr().out == "a longer name      0.25          17x\n"


def test_a_sentence_names_its_figures():
    figures = {"base / llama.cpp": 2.039, "inf: tokens/s": 1422.6}
    assert report.sentence("{base / llama.cpp|.2f}x, {inf: tokens/s|,.0f}", figures) == "2.04x, 1,423"
    with pytest.raises(KeyError):
        report.sentence("{base|.1f}", figures)


def test_a_kept_result_has_its_machine_and_command(tmp_path, monkeypatch):
    file = tmp_path / "step.json"
    file.write_text(json.dumps({"claim": "a step", "figure": "{time|.2f}x", "figures": {"time": 1.0}, "machine": "-"}))
    monkeypatch.setattr(
        sys, "argv", [str(ROOT / "bench/training/train.py"), "--data", "/a/b/gsm8k/train.jsonl", "--keep", "step"]
    )
    monkeypatch.setattr(report, "_git", lambda *words: "0123456789")
    report.keep("step", {"time": 2.25, "memory": 0.4}, tmp_path)
    kept = json.loads(file.read_text())
    assert kept["figures"] == {"time": 2.25, "memory": 0.4}
    assert kept["claim"] == "a step"
    assert kept["command"] == "python -m bench.training.train --data gsm8k/train.jsonl --keep step"
    assert kept["commit"] == "0123456789"
    assert "threads" in kept["machine"]


def test_code_that_no_commit_has_keeps_nothing(monkeypatch, capsys):
    parser = argparse.ArgumentParser()
    report.add_keep(parser)
    monkeypatch.setattr(report, "_git", lambda *words: "")
    assert parser.parse_args(["--keep", "step"]).keep == "step"
    monkeypatch.setattr(report, "_git", lambda *words: " M src/veneer/a.py")
    with pytest.raises(SystemExit):
        parser.parse_args(["--keep", "step"])
    assert "src/veneer/a.py. Commit them first." in capsys.readouterr().err


def test_changes_are_looked_for_in_the_whole_repository():
    folders = ("src", "csrc", "bench")
    assert {line.partition("/")[0] for line in report._git("ls-files", "--", *folders).splitlines()} == set(folders)


def test_outside_a_repository_nothing_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="needs the repository"):
        report._git("rev-parse", "HEAD")


def test_a_result_that_cannot_be_kept_is_refused(tmp_path):
    (tmp_path / "step.json").write_text(json.dumps({"figure": "{time|.2f}x", "figures": {"time": 1.0}}))
    with pytest.raises(SystemExit, match=r"--keep stop: there is no such claim\. Give one of step\."):
        report.keep("stop", {"time": 2.0}, tmp_path)
    with pytest.raises(SystemExit, match=r"the run has no figure .time.\. It has memory\."):
        report.keep("step", {"memory": 2.0}, tmp_path)
    assert json.loads((tmp_path / "step.json").read_text())["figures"] == {"time": 1.0}
    report.keep(None, {}, tmp_path)


_BENCHMARK = """
import sys, time
from bench.report import ends_as_interrupted
from bench.serving.engine import halt, process_group

ends_as_interrupted()
with process_group([sys.executable, "-c", "print(1, flush=True); input()"]) as engine:
    engine.stdout.readline()
    halt(engine)
    print(engine.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs process groups as Linux has them")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_halted_engine_ends_with_its_benchmark(number):
    with subprocess.Popen([sys.executable, "-c", _BENCHMARK], cwd=ROOT, stdout=-1, stderr=-3, text=True) as bench:
        assert bench.stdout is not None
        engine = int(bench.stdout.readline())
        bench.send_signal(number)
        bench.wait(PATIENCE)
    try:
        wait_until(lambda: not _is_alive(engine))
    finally:
        if _is_alive(engine):
            os.killpg(engine, signal.SIGKILL)


def _is_alive(pid: int) -> bool:
    """A process of this number is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
