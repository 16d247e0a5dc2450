"""A run that is asked to stop ends its step, writes a checkpoint, says so, and goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conftest import TinyProject


def test_a_signal_stops_a_run_that_goes_on_bit_for_bit(tiny_project: TinyProject) -> None:
    tiny_project.run("--set", f"output={tiny_project.folder / 'whole'}")
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        name = signal.Signals(number).name
        output = ("--set", f"output={tiny_project.folder / name}")
        stopped = tiny_project.start(*output, slow=True)
        stopped.wait_for("step 5/")  # in the middle of an epoch of ten steps, and of a window of the log
        time.sleep(0.15)
        os.kill(stopped.processes[0].pid, number)
        assert stopped.ended() == [code], stopped.told
        found = tiny_project.record(name)
        step = found["step"]
        assert 5 < step < 23
        assert (found["status"], found["reason"]) == ("interrupted", name)
        written = f"after step {step}: its checkpoint is written, and --resume goes on from it. The adapter in"
        assert written in stopped.told
        assert f"--adapter {tiny_project.folder / name / f'checkpoint-{step}'} " in stopped.told
        assert [path.name for path in (tiny_project.folder / name).glob("checkpoint-*")] == [f"checkpoint-{step}"]
        tiny_project.run(*output, "--resume")
        assert tiny_project.weights(name).read_bytes() == tiny_project.weights("whole").read_bytes()
        assert tiny_project.log(name) == tiny_project.log("whole")
        results = [tiny_project.record(each)["results"]["eval_loss"] for each in (name, "whole")]
        assert results[0] == results[1]


def test_an_evaluation_that_a_checkpoint_came_before_is_made_up_for(tiny_project: TinyProject) -> None:
    saves = ("max_steps=13", "save_strategy=steps", "save_steps=10", "save_total_limit=5")
    given = [part for value in saves for part in ("--set", f"training.{value}")]
    tiny_project.run(*given)
    log, weights, run = tiny_project.log(), tiny_project.weights().read_bytes(), tiny_project.folder / "run"
    whole = shutil.copytree(run, tiny_project.folder / "whole")
    for step in (10, 13):  # the last of the first epoch, and of the run
        shutil.rmtree(run)
        shutil.copytree(whole, run)
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
