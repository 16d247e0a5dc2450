"""Two processes on one run give what one process gives with the same global batch, and one of them writes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from collectives import quantized_run
from launch import program
from patience import PATIENCE

if TYPE_CHECKING:
    from conftest import TinyProject

# Neither 19 rows in global batches of 6 nor 4 held-out ones in batches of 6 come out even.
COMMON = (
    "adapter.lora_dropout=0", "training.max_steps=9", "training.logging_steps=1", "training.eval_strategy=steps",
    "training.eval_steps=3", "training.save_strategy=steps", "training.save_steps=3", "training.save_total_limit=2",
    "training.gradient_accumulation_steps=2", "training.report_to=tensorboard",
)  # fmt: skip


def options(*values: str) -> list[str]:
    return [part for value in (*COMMON, *values) for part in ("--set", value)]


def sized(size: int) -> list[str]:
    return [f"training.per_device_train_batch_size={size}", f"training.per_device_eval_batch_size={size}"]


TORCHRUN = """
import sys
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from veneer.cli.app import app

def command():
    torch.set_num_threads(1)
    app(sys.argv[1:], standalone_mode=False)

standalone = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "standalone", "max_restarts": 0}
elastic_launch(LaunchConfig(1, 1, nproc_per_node=2, start_method="fork", **standalone), command)()
"""


def with_torchrun(project: TinyProject, given: list[str]) -> str:
    """The agent of torchrun, which starts the command in two processes; it forks them, for it has all imported."""
    done = program(TORCHRUN, "train", project.folder / "recipe.yaml", *given)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(("sampling", "launcher"), [("random", "torchrun"), ("group_by_length", "none")])
def test_two_processes_train_as_one_with_the_same_global_batch(
    tiny_project: TinyProject, sampling: str, launcher: str
) -> None:
    strategy = f"training.train_sampling_strategy={sampling}"
    given = options(*sized(3), strategy)
    told = with_torchrun(tiny_project, given) if launcher == "torchrun" else tiny_project.run(*given, n_processes=2)
    tiny_project.run(*options(*sized(6), strategy, f"output={tiny_project.folder / 'one'}"))
    assert len(re.findall(r"^trains ", told, re.M)) == 1
    assert len(re.findall(r"^step 3/9  loss", told, re.M)) == 1
    assert len(re.findall(r"^saved in ", told, re.M)) == 1
    events = [len(list((tiny_project.folder / name / "runs").rglob("events.*"))) for name in ("run", "one")]
    assert events[0] == events[1] > 0
    two, one = tiny_project.log(), tiny_project.log("one")
    assert len(two) == len(one) > 9
    for ours, expected in zip(two, one, strict=True):
        assert ours.keys() == expected.keys()
        for key in ours.keys() - {"total_flos", "train_loss"}:
            assert ours[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-7), (key, ours, expected)
    adapters = [load_file(tiny_project.weights(name)) for name in ("run", "one")]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], rtol=1e-5, atol=1e-5)
    results = [tiny_project.record(name)["results"] for name in ("run", "one")]
    for key in ("eval_loss", "train_loss", "steps"):
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-5)
    kept = sorted(path.name for path in (tiny_project.folder / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-6", "checkpoint-9"]
    names = {path.name for path in (tiny_project.folder / "run" / "checkpoint-9").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "trained.safetensors"} <= names


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.full)])
def test_a_run_whose_process_was_killed_goes_on_bit_for_bit(tiny_project: TinyProject, strategy: str) -> None:
    """Three processes, whose sums depend on their order, as those of two do not; and a cut base beside a whole one."""
    given, n = [*options("adapter.lora_dropout=0.3", "training.save_steps=1"), "--resume", "auto"], 3
    shared = ("--set", f"distributed.strategy={strategy}")
    broken = tiny_project.start(*given, *shared, n_processes=n, slow=True)
    broken.wait_for("step 4/")
    broken.processes[1].kill()
    assert all(broken.ended())
    assert tiny_project.record()["status"] in ("running", "failed", "interrupted")
    tiny_project.run(*given, *shared, n_processes=n)
    tiny_project.run(*given, "--set", f"output={tiny_project.folder / 'whole'}", n_processes=n)
    assert tiny_project.weights().read_bytes() == tiny_project.weights("whole").read_bytes()
    assert tiny_project.log() == tiny_project.log("whole")


@pytest.mark.parametrize(
    ("n", "fewer", "rows"),
    [(2, 1, 2), pytest.param(4, 2, 1, marks=pytest.mark.full)],
)
def test_another_number_of_processes_goes_on_with_the_same_rows(
    tiny_project: TinyProject, n: int, fewer: int, rows: int
) -> None:
    own = ("training.max_steps=5", "training.save_steps=2", "training.save_total_limit=9", *sized(rows))
    given = [*options(*own, "distributed.global_batch=12"), "--resume", "auto"]
    at = given.index("training.gradient_accumulation_steps=2")
    del given[at - 1 : at + 1]
    tiny_project.run(*given, n_processes=n)
    before, folder = tiny_project.record(), tiny_project.folder / "run"
    expected, weights = tiny_project.log(), load_file(tiny_project.weights())
    for name in ("checkpoint-4", "checkpoint-5", "adapter"):
        shutil.rmtree(folder / name)
    (folder / "run.json").write_text(json.dumps({**before, "status": "interrupted"}))
    tiny_project.run(*given, n_processes=fewer)
    after = tiny_project.record()
    batches = [each["training"]["gradient_accumulation_steps"] for each in (before, after)]
    assert batches == [12 // (rows * n), 12 // (rows * fewer)]
    assert after["changes"] == [{"step": 2, "key": "processes", "before": n, "now": fewer}]
    for ours, theirs in zip(tiny_project.log(), expected, strict=True):
        assert ours.get("num_tokens") == theirs.get("num_tokens")  # rows are of different lengths
        for key in ours.keys() - {"total_flos", "train_loss", "epoch"}:  # epochs are counted in micro-batches
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-7), (key, ours, theirs)
    for name, tensor in load_file(tiny_project.weights()).items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("asked", [None, True])
def test_a_quantized_base_is_not_sent_with_every_step(tiny_project: TinyProject, asked: bool | None) -> None:
    """The adapter alone is, unless ``ddp_broadcast_buffers`` asks for the base's buffers."""
    base, output = tiny_project.folder / "base", tiny_project.folder / "run"
    files = [tiny_project.folder / f"sent-{rank}.json" for rank in range(2)]
    processes = [
        quantized_run(base, output, file, environment, ddp_broadcast_buffers=asked)
        for file, environment in zip(files, tiny_project.environments(2), strict=True)
    ]
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0]
    for file in files:
        told = json.loads(file.read_text())
        sums = [n.get("torch.float32", 0) for name, n in told["sent"] if name == "allreduce_"]
        assert len([n for n in sums if n > 100]) == 3
        assert told["adapter"] < max(sums) < 1.1 * told["adapter"]
        bases = [name for name, n in told["sent"] if n.get("torch.uint8") == told["codes"]]
        assert bases == ["broadcast_"] * (1 + 3 * 2 if asked else 0)  # at the start, and before each micro-batch


def test_a_signal_to_one_process_stops_both_after_the_same_step(tiny_project: TinyProject) -> None:
    stopped = tiny_project.start(*options(), n_processes=2, slow=True)
    stopped.wait_for("step 4/")
    os.kill(stopped.processes[1].pid, signal.SIGTERM)
    assert stopped.ended() == [143, 143], stopped.told
    found = tiny_project.record()
    assert (found["status"], found["reason"]) == ("interrupted", "SIGTERM")
    assert (tiny_project.folder / "run" / f"checkpoint-{found['step']}").is_dir()


def test_what_is_refused_is_told_once_and_other_numbers_of_processes_are(tiny_project: TinyProject) -> None:
    tiny_project.run(*options("training.max_steps=1"))
    refused = tiny_project.start(*options("training.max_steps=1"), "--resume", n_processes=2)
    assert refused.ended() == [2, 2]
    assert refused.told.count("error: ") == 1
    assert "processes: 1 before, 2 now" in refused.told
    assert tiny_project.record()["status"] == "finished"
