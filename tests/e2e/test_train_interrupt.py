"""A run that is asked to stop ends its step, writes a checkpoint, says so, and goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
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
    assert f"after step {step}: its checkpoint is written, and --resume goes on from it. The adapter in" in stopped.told
    assert f"--adapter {tiny_project.folder / 'run' / f'checkpoint-{step}'}`" in stopped.told
    assert [path.name for path in (tiny_project.folder / "run").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    tiny_project.run("--set", f"output={tiny_project.folder / 'whole'}")
    tiny_project.run("--resume")
    assert tiny_project.weights().read_bytes() == tiny_project.weights("whole").read_bytes()
    assert tiny_project.log() == tiny_project.log("whole")
    assert tiny_project.record()["results"]["eval_loss"] == tiny_project.record("whole")["results"]["eval_loss"]


@pytest.mark.parametrize("step", [10, 23])  # the last of the first epoch, and of the run
def test_an_evaluation_that_a_checkpoint_came_before_is_made_up_for(tiny_project: TinyProject, step: int) -> None:
    saves = ("save_strategy=steps", f"save_steps={step}", "save_total_limit=5")
    given = [part for value in saves for part in ("--set", f"training.{value}")]
    tiny_project.run(*given)
    log, weights, run = tiny_project.log(), tiny_project.weights().read_bytes(), tiny_project.folder / "run"
    for path in [run / "adapter", *run.glob("checkpoint-*")]:
        if path.name != f"checkpoint-{step}":
            shutil.rmtree(path)
    state = json.loads((run / f"checkpoint-{step}" / "trainer_state.json").read_text())
    assert not any(line["step"] == step and "eval_loss" in line for line in state["log_history"])
    (run / "run.json").write_text(json.dumps({**tiny_project.record(), "status": "interrupted"}))
    tiny_project.run(*given, "--resume")
    assert tiny_project.weights().read_bytes() == weights
    kept = [[line for line in lines if "train_loss" not in line] for lines in (tiny_project.log(), log)]
    assert kept[0] == kept[1]
