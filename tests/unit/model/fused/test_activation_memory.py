"""Memory that a step takes for each way to keep activations, as torch's own record of allocations counts it."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from tests.unit.model.allocations import allocations_of
from transformers import AutoModelForCausalLM, LlamaConfig

from veneer import LoraConfig, get_peft_model
from veneer.model.fused.decoder import fuse
from veneer.model.memory.checkpointing import checkpoint_selectively
from veneer.model.memory.offload import ActivationOffload

CONFIG = {
    "hidden_size": 160,
    "intermediate_size": 640,
    "num_hidden_layers": 8,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "vocab_size": 101,
}
IDS = torch.arange(512)[None] * 7 % 101


def peak(how: str, path: str, folder: Path) -> int:
    """Bytes that tensors of a training step hold at most, over what the model itself holds.

    They are counted, not read off the process: what an allocator keeps for later differs from machine to machine.
    """
    model = AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG))
    model = get_peft_model(model, LoraConfig(r=5, target_modules="all-linear")).train()
    if path == "fused":
        assert fuse(model)

    def step(length: int) -> None:
        with ActivationOffload(model, "disk", folder) if how == "disk" else nullcontext():
            loss = model(input_ids=IDS[:, :length], use_cache=False).logits.square().mean()
        loss.backward()

    step(16)  # gradients are there from now on
    if how == "selective":
        checkpoint_selectively(model)
    elif how == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    _, allocations = allocations_of(lambda: step(512))
    return max(accumulate(allocations))


# On the fused path little is left for full checkpointing to save: selective makes the hidden product once, going back.
@pytest.mark.parametrize(("path", "selective", "full"), [("fused", 0.35, 0.95), ("general", 0.85, 0.85)])
def test_less_is_held(path: str, selective: float, full: float, tmp_path: Path) -> None:
    peaks = {how: peak(how, path, tmp_path) for how in ("none", "selective", "full", "disk")}
    assert peaks["selective"] < selective * peaks["none"], peaks
    assert peaks["full"] < full * peaks["selective"], peaks
    assert peaks["disk"] < 0.6 * peaks["none"], peaks
