"""``veneer train`` of a recipe with a ``sweep`` part, also killed at some moment and continued."""

from __future__ import annotations

import json
import re
import signal
import time
from multiprocessing import Process
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from launch import forked
from models import llama_config, word_tokenizer
from patience import PATIENCE
from veneer.train.checkpoint import checkpoints

WORDS = [f"w{i}" for i in range(23)]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a base model, rows and a recipe of three members."""
    tokenizer = word_tokenizer(WORDS)
    tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    config = llama_config(
        intermediate_size=44, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=1, pad_token_id=1
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    rows = [{"text": " ".join(f"w{(i * j) % 23}" for j in range(3 + i % 5))} for i in range(26)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    recipe = {
        "model": {"source": "base"},
        "adapter": {"method": "lora", "r": 3, "lora_alpha": 5, "lora_dropout": 0.2},
        "data": {"train": "rows.jsonl", "eval_fraction": 0.2, "train_on": "everything"},
        "training": {
            "max_steps": 17, "per_device_train_batch_size": 2, "learning_rate": 0.02, "logging_steps": 1,
            "eval_steps": 4, "save_steps": 1, "bf16": False, "report_to": "none",
        },
        "sweep": {
            "members": [
                {"name": "lora"},
                {"name": "dora", "adapter.use_dora": True},
                {"name": "ia3", "adapter": {"method": "ia3"}},
            ],
        },
    }  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def start(project: Path, output: str, *options: str, slow: bool = False) -> tuple[Process, Path]:
    """The process, and the file that its output goes into."""
    log = project / f"{len(list(project.glob('*.log')))}.log"
    command = ["train", str(project / "sweep.yaml"), "--set", f"output={project / output}", *options]
    return forked(command, log, {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}, slow=slow), log


def finish(process: Process, log: Path, code: int = 0) -> str:
    process.join(PATIENCE)
    assert process.exitcode == code, log.read_text()
    return log.read_text()


def losses(folder: Path) -> dict[int, tuple[float, ...]]:
    log: list[dict[str, Any]] = json.loads((folder / "run.json").read_text())["log"]
    found = {line["step"]: (line["loss"], line["grad_norm"]) for line in log if "loss" in line}
    return found | {-line["step"]: (line["eval_loss"],) for line in log if "eval_loss" in line}


def test_a_sweep_killed_anywhere_and_resumed_is_the_sweep_that_was_not(project: Path) -> None:
    whole = start(project, "whole")
    process, _ = start(project, "broken", slow=True)
    while process.is_alive() and len(checkpoints(project / "broken" / "lora")) == 0:
        time.sleep(0.02)
    time.sleep(0.3)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the sweep ended before it was killed"
    shown = finish(*start(project, "broken", "--resume"))
    assert "Traceback" not in shown
    finish(*whole)
    for name in ("lora", "dora", "ia3"):
        expected, found = losses(project / "whole" / name), losses(project / "broken" / name)
        assert found.keys() == expected.keys()
        for step, values in expected.items():
            assert found[step] == pytest.approx(values, rel=1e-3), (name, step)
        assert json.loads((project / "broken" / name / "run.json").read_text())["results"]["steps"] == 17


def test_the_table_and_the_files(project: Path) -> None:
    shown = finish(*start(project, "out", "--set", "training.max_steps=3"))
    assert re.search(r"^dora: step 3/3  held out: loss \d", shown, re.M), shown
    lines = [line.split() for line in shown.splitlines()]
    assert {line[0] for line in lines if line and line[-1] == "*"} <= {"lora", "dora", "ia3"}
    written = json.loads((project / "out" / "sweep.json").read_text())
    assert [member["name"] for member in written["members"]] == ["lora", "dora", "ia3"]
    assert any(member["best"] for member in written["members"])
    for name in ("pareto.png", "pareto.html", "lora/adapter/adapter_model.safetensors", "ia3/loss.png"):
        assert (project / "out" / name).is_file(), name


def test_a_key_that_is_wrong_is_named(project: Path) -> None:
    shown = finish(*start(project, "out", "--set", "sweep.grid={adapter.lora_alpa: [3]}"), code=2)
    assert "lora_alpha" in " ".join(shown.split())


def test_missing_files_of_rows_are_told_together_and_nothing_is_made(project: Path) -> None:
    shown = finish(*start(project, "out", "--set", "data={train: none.jsonl, eval: held_out.jsonl}"), code=2)
    told = " ".join(shown.split())
    given = "--set data={train: none.jsonl, eval: held_out.jsonl}: data."
    assert f"{given}train: there is no file none.jsonl {given}eval: there is no file held_out.jsonl" in told
    assert not (project / "out").exists()
