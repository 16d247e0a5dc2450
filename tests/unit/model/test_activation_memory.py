"""How much memory a step takes, measured in a process of its own for each way to keep activations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, torch
from pathlib import Path
from contextlib import nullcontext
from transformers import AutoModelForCausalLM, LlamaConfig
from veneer import LoraConfig, get_peft_model
from veneer.model.checkpointing import checkpoint_selectively
from veneer.model.fused.decoder import fuse
from veneer.model.offload import ActivationOffload

how, path, folder = sys.argv[1:]
torch.set_num_threads(1)
config = LlamaConfig(hidden_size=320, intermediate_size=1280, num_hidden_layers=8, num_attention_heads=5,
                     num_key_value_heads=5, vocab_size=101)
model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=5, target_modules="all-linear")).train()
if path == "fused":
    assert fuse(model)
ids = torch.arange(1024)[None] * 7 % 101

def step(n):
    with ActivationOffload(model, "disk", Path(folder)) if how == "disk" else nullcontext():
        loss = model(input_ids=ids[:, :n], use_cache=False).logits.float().square().mean()
    loss.backward()

def high_water():  # of this program alone: getrusage counts what ran before in the process
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

step(16)
if how == "selective":
    checkpoint_selectively(model)
elif how == "full":
    model.gradient_checkpointing_enable({"use_reentrant": False})
before = high_water()
step(1024)
print(high_water() - before)
"""


def peak(how: str, path: str, folder: Path) -> float:
    """Kilobytes by which a step raises the high-water mark of a fresh process."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, how, path, str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(("path", "selective"), [("fused", 0.75), ("general", 0.85)])
def test_less_is_held(path: str, selective: float, tmp_path: Path) -> None:
    peaks = {how: peak(how, path, tmp_path) for how in ("none", "selective", "full", "disk")}
    assert peaks["selective"] < selective * peaks["none"], peaks
    assert peaks["full"] < 0.85 * peaks["selective"], peaks
    assert peaks["disk"] < 0.6 * peaks["none"], peaks
