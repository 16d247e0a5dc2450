"""A small project whose recipe is carried out in processes of its own, one or two at once, which may be stopped."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from bare_runs import draw_nothing, plan_nothing, plan_once
from launch import forked
from models import llama_config, word_tokenizer
from patience import PATIENCE

WORDS = [f"w{i}" for i in range(53)]


class Run:
    """A recipe that is being carried out by one or several processes."""

    def __init__(self, processes: list[Any], log: Path) -> None:
        self.processes, self._log = processes, log

    @property
    def told(self) -> str:
        """Return the text printed so far on stdout and stderr."""
        return self._log.read_text() if self._log.exists() else ""

    def wait_for(self, text: str) -> None:
        """Come back when ``text`` was printed."""
        while text not in self.told:
            assert self.processes[0].is_alive(), self.told
            time.sleep(0.01)

    def ended(self) -> list[int]:
        """Wait for all processes; their exit codes."""
        for process in self.processes:
            process.join(PATIENCE)
        return [process.exitcode for process in self.processes]


@pytest.fixture(autouse=True)
def as_in_processes(known_machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that a test runs in its own process measure nothing, draw nothing and plan once; others plan nothing."""
    plan_once(monkeypatch.setattr)
    draw_nothing(monkeypatch.setattr)


@pytest.fixture
def unplanned(as_in_processes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in the test's own process plan nothing either."""
    plan_nothing(monkeypatch.setattr)


@dataclass(frozen=True)
class TinyProject:
    """A folder with a base, rows and a recipe."""

    folder: Path

    def start(self, *options: str, n_processes: int = 1, slow: bool = False) -> Run:
        log = self.folder / f"{len(list(self.folder.glob('*.log')))}.log"
        arguments = ["train", str(self.folder / "recipe.yaml"), *options]
        return Run([forked(arguments, log, each, slow=slow) for each in self.environments(n_processes)], log)

    def environments(self, n_processes: int) -> list[dict[str, str]]:
        """The environments of processes that meet."""
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(n_processes)}
        return [
            {**meeting, "RANK": str(i), "LOCAL_RANK": str(i)} if n_processes > 1 else {} for i in range(n_processes)
        ]

    def run(self, *options: str, n_processes: int = 1) -> str:
        """Carry the recipe out to its end; what was printed on stdout and stderr."""
        started = self.start(*options, n_processes=n_processes)
        assert started.ended() == [0] * n_processes, started.told
        return started.told

    def record(self, name: str = "run") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / name / "run.json").read_text())
        return found

    def log(self, name: str = "run") -> list[dict[str, Any]]:
        """The lines of the log without what a clock measures."""
        return [
            {key: value for key, value in line.items() if not key.endswith(("_second", "runtime", "_time"))}
            for line in self.record(name)["log"]
        ]

    def weights(self, name: str = "run") -> Path:
        return self.folder / name / "adapter" / "adapter_model.safetensors"


@pytest.fixture
def tiny_project(tmp_path: Path) -> TinyProject:
    """19 rows to train on (of 2 to 8 words) and 4 held out, dropout, and an evaluation after each epoch."""
    tokenizer = word_tokenizer(WORDS, ("<unk>", "<end>"))
    torch.manual_seed(3)
    config = llama_config(
        intermediate_size=44, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=1, pad_token_id=1
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"text": " ".join(WORDS[(i * j + 3) % 53] for j in range(2 + i % 7))} for i in range(23)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    recipe = {
        "model": {"source": "base"},
        "adapter": {"method": "lora", "r": 3, "lora_alpha": 5, "lora_dropout": 0.3, "target_modules": "all-linear"},
        "data": {"train": "rows.jsonl", "eval_fraction": 0.2, "train_on": "everything"},
        "training": {
            "max_steps": 23, "per_device_train_batch_size": 2, "learning_rate": 0.02, "logging_steps": 5,
            "eval_strategy": "epoch", "save_strategy": "no", "bf16": False, "report_to": "none",
            "early_stopping_patience": 9, "disable_tqdm": True,
        },
        "output": str(tmp_path / "run"),
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return TinyProject(tmp_path)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
