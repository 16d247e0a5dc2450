"""A run that is asked to stop ends its step, writes a checkpoint, says so, and goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

TINY = runpy.run_path(str(Path(__file__).with_name("train_tiny.py")))
COMMAND = "from veneer.cli.app import main; main()"
SLOW = (  # leaves time for a signal
    "import time\nfrom veneer.train.progress import Progress\n"
    "counted = Progress.add_tokens\n"
    "def slowly(*args):\n    time.sleep(0.1)\n    counted(*args)\n"
    "Progress.add_tokens = slowly\n"
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    shape = {"hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = LlamaConfig(**shape, num_key_value_heads=1, vocab_size=59, bos_token_id=1, eos_token_id=1, pad_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    TINY["tiny_tokenizer"]().save_pretrained(tmp_path / "base")
    rows = [{"text": " ".join(TINY["WORDS"][(i * j + 3) % 53] for j in range(2 + i % 7))} for i in range(23)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    recipe = {
        "model": {"source": "base"},
        "adapter": {"method": "lora", "r": 3, "lora_alpha": 5, "lora_dropout": 0.3, "target_modules": "all-linear"},
        "data": {"train": "rows.jsonl", "eval_fraction": 0.2, "train_on": "everything"},
        "training": {
            "max_steps": 23, "per_device_train_batch_size": 2, "learning_rate": 0.02, "logging_steps": 5,
            "eval_strategy": "epoch", "save_strategy": "no", "bf16": False, "report_to": "none",
            "early_stopping_patience": 9,
        },
        "output": str(tmp_path / "run"),
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def start(project: Path, *options: str, slow: bool = False) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", (SLOW if slow else "") + COMMAND, "train", str(project / "recipe.yaml"), *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def record(project: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((project / name / "run.json").read_text())
    return found


def lines(project: Path, name: str) -> list[dict[str, Any]]:
    """The log without what is measured by a clock."""
    return [
        {key: value for key, value in line.items() if not key.endswith(("_second", "runtime"))}
        for line in record(project, name)["log"]
    ]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_a_run_that_goes_on_bit_for_bit(project: Path, number: int, code: int) -> None:
    stopped = start(project, slow=True)
    assert stopped.stderr is not None
    for line in stopped.stderr:
        if line.startswith("step 5/"):  # in the middle of an epoch of ten steps, and of a window of the log
            time.sleep(0.15)
            stopped.send_signal(number)
            break
    _, told = stopped.communicate(timeout=200)
    assert stopped.returncode == code, told
    found = record(project, "run")
    step = found["step"]
    assert 5 < step < 23
    assert (found["status"], found["reason"]) == ("interrupted", signal.Signals(number).name)
    assert f"after step {step}: its checkpoint is written, and --resume goes on from it" in told
    assert [path.name for path in (project / "run").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    whole = start(project, "--set", f"output={project / 'whole'}")
    _, told = whole.communicate(timeout=200)
    assert whole.returncode == 0, told
    resumed = start(project, "--resume")
    _, told = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, told
    weights = [(project / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]
    assert lines(project, "run") == lines(project, "whole")
    assert record(project, "run")["results"]["eval_loss"] == record(project, "whole")["results"]["eval_loss"]
