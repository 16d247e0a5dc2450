"""Two processes on one preference run: what one process gives with the same global batch, written by one of them."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

if TYPE_CHECKING:
    from conftest import TinyProject

TRAINING = {
    "max_steps": 7, "learning_rate": 0.02, "logging_steps": 1, "save_steps": 1, "save_total_limit": 3, "bf16": False,
    "report_to": "none", "disable_tqdm": True,
}  # fmt: skip


def make(project: TinyProject, task: str, dropout: float = 0.0, n_rows: int = 24, **changes: Any) -> None:
    """A recipe of a task over rows of which a quarter is held out: of 24, 18 to train on, three global batches of 6."""
    word = "w{}".format
    rows = [
        {
            "prompt": " ".join(word((i * j + 3) % 53) for j in range(2 + i % 5)),
            "chosen": f" {word(i)} {word((i * 7) % 53)}",
            "rejected": f" {word((i * 5 + 1) % 53)}",
        }
        for i in range(n_rows)
    ]
    (project.folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = yaml.safe_load((project.folder / "recipe.yaml").read_text())
    recipe |= {"task": task, "data": {"train": "pairs.jsonl", "eval_fraction": 0.25}, **changes}
    recipe["adapter"]["lora_dropout"] = dropout
    recipe["training"] = {**TRAINING, **changes.get("training", {})}
    (project.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def sized(size: int, *more: str) -> list[str]:
    given = [f"training.per_device_train_batch_size={size}", f"training.per_device_eval_batch_size={size}", *more]
    return [part for value in given for part in ("--set", value)]


# DPO: of 23 rows 5 are left after three batches of 6, an odd number, and 2 of the 8 held-out ones, an even one. Reward:
# 4 of 22 and 1 of 7, and the last step of an epoch has a full micro-batch before them.
@pytest.mark.parametrize(("task", "n_rows", "accumulated"), [("dpo", 31, 1), ("reward", 29, 2)])
def test_two_processes_are_one_with_the_same_global_batch(
    tiny_project: TinyProject, task: str, n_rows: int, accumulated: int
) -> None:
    steps = {"eval_strategy": "steps", "eval_steps": 3, "gradient_accumulation_steps": accumulated}
    make(tiny_project, task, n_rows=n_rows, training=steps)
    told = tiny_project.run(*sized(3, "distributed.strategy=fsdp"), n_processes=2)  # also with a base that is cut
    tiny_project.run(*sized(6, f"output={tiny_project.folder / 'one'}"))
    assert told.count("saved in ") == told.count("step 3/7  loss") == 1
    assert "repeats" not in told
    two, one = tiny_project.log(), tiny_project.log("one")
    assert len(two) == len(one) > 7
    for ours, expected in zip(two, one, strict=True):
        assert ours.keys() == expected.keys()
        for key in ours.keys() - {"total_flos"}:
            assert ours[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6), (key, ours, expected)
    adapters = [load_file(tiny_project.weights(name)) for name in ("run", "one")]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in (tiny_project.folder / "run").glob("checkpoint-*")) == [
        "checkpoint-5", "checkpoint-6", "checkpoint-7",
    ]  # fmt: skip
    names = {path.name for path in (tiny_project.folder / "run" / "checkpoint-7").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "trained.safetensors"} <= names


def test_kto_on_a_cut_base_is_kto_on_a_whole_one_to_the_bit(tiny_project: TinyProject) -> None:
    """Its KL is taken over the rows of a process, so one process is another run."""
    make(tiny_project, "kto", 0.3, training={"max_steps": 2, "save_steps": 2})
    tiny_project.run(*sized(3, "distributed.strategy=fsdp"), n_processes=2)
    tiny_project.run(*sized(3, f"output={tiny_project.folder / 'whole'}"), n_processes=2)
    assert tiny_project.record()["shard"] == 2
    assert tiny_project.weights().read_bytes() == tiny_project.weights("whole").read_bytes()
    assert tiny_project.log() == tiny_project.log("whole")


def test_grpo_of_two_processes_killed_and_resumed_is_the_run_that_was_not(tiny_project: TinyProject) -> None:
    make(
        tiny_project, "grpo", 0.3,
        rewards=[{"function": "length", "target": 3}],
        training={"num_generations": 3, "max_completion_length": 5, "beta": 0.1, "steps_per_generation": 2},
    )  # fmt: skip
    given = sized(3)
    broken = tiny_project.start(*given, n_processes=2, slow=True)
    broken.wait_for("step 3/")
    os.kill(broken.processes[1].pid, signal.SIGKILL)
    assert all(broken.ended()), broken.told
    tiny_project.run(*given, "--resume", n_processes=2)
    told = tiny_project.run(*given, "--set", f"output={tiny_project.folder / 'whole'}", n_processes=2)
    assert told.count("step 3/7  loss") == 1
    assert tiny_project.weights().read_bytes() == tiny_project.weights("whole").read_bytes()
    kept = [
        [{k: v for k, v in line.items() if not k.startswith(("total_", "train_"))} for line in tiny_project.log(name)]
        for name in ("run", "whole")
    ]
    assert kept[0] == kept[1]
