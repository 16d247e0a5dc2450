"""BEFT against PEFT."""

from __future__ import annotations

import torch

from methods_in_peft import assert_equals_peft, base, every_base
from veneer import BeftConfig, get_peft_model


@every_base
def test_it_equals_peft(on, tmp_path):
    assert_equals_peft(BeftConfig, "BeftConfig", tmp_path, on, init_weights=False)


def test_value_projections_are_adapted_and_start_as_the_base():
    model = get_peft_model(base(), BeftConfig())
    assert model.targeted_module_names == [f"model.layers.{k}.self_attn.v_proj" for k in range(2)]
    tokens = torch.arange(5)[None]
    assert torch.equal(model(tokens).logits, base()(tokens).logits)
