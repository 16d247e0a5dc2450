"""A small project whose recipe is carried out in processes of its own, one or two at once, which may be stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from models import llama_config, word_tokenizer

WORDS = [f"w{i}" for i in range(53)]
COMMAND = "from veneer.cli.app import main\nmain()\n"
SLOW = (  # leaves time for a signal in every micro-batch
    "import time\nfrom veneer.train.progress import Progress\n"
    "counted = Progress.add_tokens\n"
    "def slowly(*args):\n    time.sleep(0.1)\n    counted(*args)\n"
    "Progress.add_tokens = slowly\n"
)


@dataclass(frozen=True)
class TinyProject:
    """A folder with a base, rows and a recipe."""

    folder: Path

    def start(self, *options: str, n_processes: int = 1, slow: bool = False) -> subprocess.Popen[str]:
        script = self.folder / ("slow.py" if slow else "fast.py")
        script.write_text((SLOW if slow else "") + COMMAND)
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"]
        command = [sys.executable, *(launch if n_processes > 1 else []), str(script)]
        return subprocess.Popen(
            [*command, "train", str(self.folder / "recipe.yaml"), *options],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *options: str, n_processes: int = 1) -> str:
        """Carry the recipe out to its end; what was printed on stdout and stderr."""
        process = self.start(*options, n_processes=n_processes)
        told, errors = process.communicate(timeout=250)
        assert process.returncode == 0, errors
        return told + errors

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
            "early_stopping_patience": 9,
        },
        "output": str(tmp_path / "run"),
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return TinyProject(tmp_path)
