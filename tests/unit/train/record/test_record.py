"""A run as ``run.json`` tells it: whether a run is over, trains, or is gone without a word."""

import json
import os
import socket
import subprocess
import sys

import psutil
import pytest

from veneer.errors import ConfigError, FormatError
from veneer.train.record.record import life_of, record_of, require_over, this_process, told_life


def running(**process):
    return {"status": "running", "recipe": {}, "process": {**this_process(), **process}}


@pytest.fixture
def other():
    """A process that runs, and when it was started."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield {"pid": process.pid, "started": psutil.Process(process.pid).create_time()}
        process.communicate()


def test_a_process_is_known_by_machine_number_and_start():
    assert this_process() == {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def test_a_running_run_runs_or_is_gone(other):
    assert life_of(running(**other)) == "runs"
    assert life_of(running(pid=other["pid"], started=other["started"] - 60)) == "gone"  # the number was given again
    assert life_of(running(pid=2**22 - 1)) == "gone"
    assert life_of(running(host="another-machine")) == "elsewhere"
    assert life_of({"status": "running", "recipe": {}}) == "elsewhere"
    assert life_of({**running(**other), "status": "finished"}) == "over"


def test_a_run_that_trains_is_let_alone(other, tmp_path):
    with pytest.raises(ConfigError, match=rf"process {other['pid']} is training in .*run right now"):
        require_over(running(**other), tmp_path / "run")
    require_over(running(pid=2**22 - 1), tmp_path)


def test_it_is_told_how_a_run_stands(other):
    assert told_life(running(**other)) == f"running (process {other['pid']} on {socket.gethostname()})"
    assert "ended unexpectedly: its record says running, but process 4194303" in told_life(running(pid=2**22 - 1))
    assert "by its record; that cannot be checked from this machine" in told_life(running(host="elsewhere"))
    assert told_life({"status": "diverged"}) == "diverged"


@pytest.mark.parametrize("text", ["{", "[]", '{"status": "finished"}'])
def test_a_damaged_record_is_one_message(tmp_path, text):
    assert record_of(tmp_path) is None
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(FormatError, match=r"run\.json (cannot be read|is not the record of a run)"):
        record_of(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"status": "failed", "recipe": {}}))
    assert record_of(tmp_path) == {"status": "failed", "recipe": {}}
