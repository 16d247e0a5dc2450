"""A run that is killed at any moment and resumed repeats the run that was not."""

from __future__ import annotations

import json
import random
import signal
import time
from multiprocessing import Process
from pathlib import Path

from launch import started
from patience import PATIENCE
from veneer.train.checkpoint import checkpoints

STEPS = 17
SCRIPT = Path(__file__).with_name("train_tiny.py")


def start(folder: Path, *options: str) -> Process:
    return started(SCRIPT, folder, STEPS, *options, stdout=folder.with_suffix(".log"))


def finish(process: Process, folder: Path) -> None:
    process.join(PATIENCE)
    assert process.exitcode == 0, folder.with_suffix(".log").read_text()


def losses(folder: Path) -> dict[int, tuple[float, float, float]]:
    history = json.loads((folder / "history.json").read_text())
    return {
        line["step"]: (line["loss"], line["grad_norm"], line["num_tokens"]) for line in history if "loss" in line
    } | {-line["step"]: (line["eval_loss"], 0.0, 0.0) for line in history if "eval_loss" in line}


def test_killed_anywhere_and_resumed_gives_the_same_losses_and_weights(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    uninterrupted = start(whole)
    killed_after = random.Random().randint(3, STEPS - 3)
    process = start(broken, "--slow")
    while process.is_alive() and len(checkpoints(broken)) == 0:
        time.sleep(0.02)
    while process.is_alive() and int(checkpoints(broken)[-1].name.rpartition("-")[2]) < killed_after:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"the run ended before it was killed at {killed_after}"
    # What a crash in the middle of a write leaves behind: under its own name it is never taken for a checkpoint.
    half = broken / f".checkpoint-{STEPS + 1}.partial-4242-0badcafe"
    half.mkdir()
    (half / "trainer_state.json").write_text("{}")
    finish(start(broken, "--resume"), broken)
    finish(uninterrupted, whole)
    assert losses(broken) == losses(whole), f"killed after step {killed_after}"
    final = [(folder / f"checkpoint-{STEPS}" / "trained.safetensors").read_bytes() for folder in (whole, broken)]
    assert final[0] == final[1]
    assert not half.exists()
