"""A run that is killed at any moment and resumed repeats the run that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from veneer.train.checkpoint import checkpoints

STEPS = 17
SCRIPT = Path(__file__).with_name("train_tiny.py")


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), str(STEPS), *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output


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
    while process.poll() is None and len(checkpoints(broken)) == 0:
        time.sleep(0.02)
    while process.poll() is None and int(checkpoints(broken)[-1].name.rpartition("-")[2]) < killed_after:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, f"the run ended before it was killed at {killed_after}"
    # What a crash in the middle of a write leaves behind: under its own name it is never taken for a checkpoint.
    half = broken / f".checkpoint-{STEPS + 1}.partial-4242-0badcafe"
    half.mkdir()
    (half / "trainer_state.json").write_text("{}")
    finish(start(broken, "--resume"))
    finish(uninterrupted)
    assert losses(broken) == losses(whole), f"killed after step {killed_after}"
    final = [(folder / f"checkpoint-{STEPS}" / "trained.safetensors").read_bytes() for folder in (whole, broken)]
    assert final[0] == final[1]
    assert not half.exists()
