"""Saving an adapter while it is merged: the base's own table is kept, not the one that it was folded into."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from veneer import LoraConfig, PeftModel, get_peft_model

from .conftest import make_tiny

IDS = torch.randint(0, 101, (2, 7), generator=torch.Generator().manual_seed(3))
TABLE = LoraConfig(r=3, lora_alpha=7, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
ROWS = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], trainable_token_indices=[5, 11])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("config", [TABLE, ROWS], ids=["table", "rows"])
def test_a_merged_adapter_is_saved_as_one_that_is_not(config: LoraConfig, tmp_path: Path) -> None:
    model = get_peft_model(make_tiny(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "token_adapter" in name:
                parameter.normal_()
    adapted = logits(model)
    model.save_pretrained(tmp_path / "beside", save_embedding_layers=True)
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged", save_embedding_layers=True)
    beside, merged = (load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("beside", "merged"))
    assert beside.keys() == merged.keys()
    assert all(torch.equal(beside[key], merged[key]) for key in beside)
    back = PeftModel.from_pretrained(make_tiny(), tmp_path / "merged")
    torch.testing.assert_close(logits(back), adapted, rtol=0, atol=0)
