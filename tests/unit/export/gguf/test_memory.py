"""An export takes the memory of about one tensor, whatever the size of the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from veneer.adapters.peft_model import get_peft_model
from veneer.methods.lora import LoraConfig

from .test_model import adapter_folder
from .tiny import tiny_folder, tiny_model, tokenizer

MEASURE = """
import sys
from pathlib import Path
from veneer.export.gguf.model import GgufOptions, export_gguf

def high_water():  # of this program alone: getrusage counts what the process was before exec
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

def export(folder):
    for kind in ("Q4_K_M", "F32"):
        options = GgufOptions(type=kind, overwrite=True)
        export_gguf(folder / "base", folder / "x.gguf", options, adapter=folder / "adapter")

export(Path(sys.argv[1]))
before = high_water()
export(Path(sys.argv[2]))
print(high_water() - before)
"""
LARGEST = 2 * 1024 * 4096
SMALL_THINGS = 1 << 22  # the adapter, and the model without storage


@pytest.fixture(scope="module")
def many_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 base of twenty times its largest tensor, and an adapter of all its matrices."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 5, "num_key_value_heads": 4}
    model = tiny_model("mistral", **sizes).to(torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) * 2 > 20 * LARGEST
    model.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    lora = LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear")
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/status")
def test_the_peak_is_below_twice_the_largest_tensor(tmp_path: Path, many_layers: Path) -> None:
    warm = tiny_folder(tmp_path / "base", "mistral")
    adapter_folder(tmp_path / "adapter", warm, target_modules=["q_proj", "down_proj"])
    order = [sys.executable, "-c", MEASURE, str(tmp_path), str(many_layers)]
    done = subprocess.run(order, capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 2 * LARGEST + SMALL_THINGS
