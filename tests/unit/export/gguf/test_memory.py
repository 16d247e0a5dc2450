"""An export takes the memory of about one tensor, whatever the size of the model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from launch import program
from veneer.adapters.peft_model import get_peft_model
from veneer.methods.lora import LoraConfig

from .test_model import adapter_folder
from .tiny import tiny_folder, tiny_model, tokenizer

MEASURE = """
import ctypes
import json
import sys
from pathlib import Path
from peak_memory import give_back_what_is_freed, high_water
from veneer.export.gguf.model import GgufOptions, export_gguf

give_back_what_is_freed()

def peak_of_export(folder, kind):
    ctypes.CDLL(None).malloc_trim(0)  # small blocks that are free of the exports before
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    options = GgufOptions(type=kind, overwrite=True)
    export_gguf(folder / "base", folder / "x.gguf", options, adapter=folder / "adapter")
    return high_water() - before

folders = [Path(name) for name in sys.argv[1:]]  # the first is small: what is loaded and kept once is not counted
print(json.dumps({folder.name: max(peak_of_export(folder, kind) for kind in ("Q4_K_M", "F32")) for folder in folders}))
"""
SMALL_THINGS = 1 << 22  # the adapter, and the model without storage
SIZES = {
    "mistral": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 5, "num_key_value_heads": 4},
    "gpt2": {"n_embd": 768, "n_inner": 3072, "n_layer": 7, "vocab_size": 6144},
    "gptneox": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 7, "vocab_size": 6144},
}
"""Models with matrices read whole (turned in GPT-2, in another order in GPT-NeoX); their embeddings are larger."""


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The peak of an export by family, in bytes for each byte of the largest tensor."""
    folder = tmp_path_factory.mktemp("memory")
    adapter_folder(
        folder / "warm" / "adapter", tiny_folder(folder / "warm" / "base", "mistral"), target_modules="all-linear"
    )
    largest = {family: many_layers(folder / family, family) for family in SIZES}
    done = program(MEASURE, *(folder / name for name in ("warm", *SIZES)))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return {family: (found[family] - SMALL_THINGS) / n_bytes for family, n_bytes in largest.items()}


def many_layers(folder: Path, family: str) -> int:
    """A base of more than ten times its largest tensor, and an adapter of all its matrices; that tensor's bytes."""
    model = tiny_model(family, **SIZES[family]).to(torch.bfloat16)
    largest: int = max(parameter.nbytes for parameter in model.parameters())
    assert sum(parameter.nbytes for parameter in model.parameters()) > 10 * largest
    model.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    lora = LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear")
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    return largest


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/status")
@pytest.mark.parametrize("family", SIZES)
def test_the_peak_is_below_twice_the_largest_tensor(peaks: dict[str, float], family: str) -> None:
    assert peaks[family] < 2
