"""A run over streamed rows that is killed goes on at the row where it was, to the bit."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
import yaml

if TYPE_CHECKING:
    from conftest import TinyProject


@pytest.fixture
def streamed(tiny_project: TinyProject) -> TinyProject:
    """23 rows that are streamed in batches of 2 from a buffer: twelve steps an epoch."""
    path = tiny_project.folder / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["data"] = {"train": "rows.jsonl", "streaming": True, "train_on": "everything"}
    recipe["training"] |= {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "logging_steps": 1}
    del recipe["training"]["early_stopping_patience"]
    path.write_text(yaml.safe_dump(recipe))
    return tiny_project


def test_a_streamed_run_goes_on_at_its_row(streamed: TinyProject) -> None:
    def output(name: str) -> tuple[str, ...]:
        return ("--set", "training.max_steps=17", "--set", f"output={streamed.folder / name}")

    streamed.run(*output("whole"))
    whole = [line for line in streamed.log("whole") if "loss" in line]
    assert len(whole) == 17
    for step in (5, 12, 14):  # in the first epoch, at its end, and in the second
        name = f"killed-{step}"
        broken = streamed.start(*output(name), slow=True)
        broken.wait_for(f"step {step}/")
        broken.processes[0].kill()
        assert broken.ended() == [-signal.SIGKILL]
        told = streamed.run(*output(name), "--resume")
        assert "step 2/" not in told
        assert streamed.weights(name).read_bytes() == streamed.weights("whole").read_bytes()
        assert [line for line in streamed.log(name) if "loss" in line] == whole


def test_an_epoch_that_was_evaluated_is_not_evaluated_again(streamed: TinyProject) -> None:
    path = streamed.folder / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["data"]["eval"] = "rows.jsonl"
    recipe["training"] |= {"eval_strategy": "epoch", "save_strategy": "epoch", "early_stopping_patience": 1}
    path.write_text(yaml.safe_dump(recipe))
    broken = streamed.start(slow=True)
    broken.wait_for("step 14/")
    broken.processes[0].kill()
    assert broken.ended() == [-signal.SIGKILL]
    streamed.run("--resume")
    streamed.run("--set", f"output={streamed.folder / 'whole'}")
    logs = [[line["step"] for line in streamed.log(name) if "eval_loss" in line] for name in ("run", "whole")]
    assert logs[0] == logs[1]
    assert len(logs[0]) > 2


def test_streamed_rows_of_another_file_are_refused(streamed: TinyProject) -> None:
    streamed.run("--set", "training.max_steps=3")
    rows = streamed.folder / "rows.jsonl"
    rows.write_text(rows.read_text().replace("w3", "w4"))
    refused = streamed.start("--resume", "--set", "training.max_steps=5")
    assert refused.ended() == [2]
    assert "data.train: a file with the hash" in refused.told
