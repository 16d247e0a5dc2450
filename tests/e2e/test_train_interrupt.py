"""A run that is asked to stop ends its step, writes a checkpoint, says so, and goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import TinyProject


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_a_run_that_goes_on_bit_for_bit(tiny_project: TinyProject, number: int, code: int) -> None:
    stopped = tiny_project.start(slow=True)
    stopped.wait_for("step 5/")  # in the middle of an epoch of ten steps, and of a window of the log
    time.sleep(0.15)
    os.kill(stopped.processes[0].pid, number)
    assert stopped.ended() == [code], stopped.told
    found = tiny_project.record()
    step = found["step"]
    assert 5 < step < 23
    assert (found["status"], found["reason"]) == ("interrupted", signal.Signals(number).name)
    assert f"after step {step}: its checkpoint is written, and --resume goes on from it" in stopped.told
    assert [path.name for path in (tiny_project.folder / "run").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    tiny_project.run("--set", f"output={tiny_project.folder / 'whole'}")
    tiny_project.run("--resume")
    assert tiny_project.weights().read_bytes() == tiny_project.weights("whole").read_bytes()
    assert tiny_project.log() == tiny_project.log("whole")
    assert tiny_project.record()["results"]["eval_loss"] == tiny_project.record("whole")["results"]["eval_loss"]
