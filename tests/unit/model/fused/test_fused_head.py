"""The head of a fused decoder: taken out of it where logits are its output, so that the loss can be fused with it."""

from __future__ import annotations

import pytest
import torch
from tests.unit.model.conftest import base
from torch import nn

from veneer import LoraConfig, get_peft_model
from veneer.model.fused.decoder import fused, fused_head
from veneer.model.fused.head import hidden_as_logits

LORA = LoraConfig(r=5, lora_alpha=7, target_modules="all-linear", init_lora_weights=False)
IDS = (torch.arange(3 * 17).view(3, 17) * 31 + 5) % 97


@pytest.mark.parametrize(("family", "expected"), [("llama", True), ("gemma2", False)])
def test_the_head_is_taken_out_only_where_logits_are_its_output(family: str, expected: bool) -> None:
    model = get_peft_model(base(family), LORA)
    model.lm_head.weight.requires_grad_(False)
    assert fused_head(model) is None
    with fused(model):
        assert (fused_head(model) is not None) is expected
        model.lm_head.weight.requires_grad_(True)
        assert fused_head(model) is None


def test_an_adapted_head_stays() -> None:
    model = get_peft_model(base("llama"), LoraConfig(r=5, target_modules=["lm_head", "q_proj"]))
    with fused(model):
        assert fused_head(model) is None


def test_hidden_states_come_out_where_logits_would() -> None:
    model = get_peft_model(base("llama"), LORA)
    head = model.lm_head
    with hidden_as_logits(model):
        hidden = model(IDS).logits
    assert type(model.lm_head) is type(head) is nn.Linear
    torch.testing.assert_close(head(hidden), model(IDS).logits)
