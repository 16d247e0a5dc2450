"""The base's own weights under their own names while adapters are on it: the oracle is the plain model."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from veneer import (
    BottleneckConfig,
    LoraConfig,
    PrefixTuningConfig,
    get_base_model_state_dict,
    get_peft_model,
    inject_adapter_in_model,
    set_base_model_state_dict,
)
from veneer.errors import AdapterNameError, FormatError

CONFIGS = {
    "lora": LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", modules_to_save=["norm"], bias="all"),
    "rows": LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], trainable_token_indices=[2, 5]),
    "bottleneck": BottleneckConfig(reduction_factor=5),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_it_is_that_of_the_plain_model(name: str, family: str, tiny: Any, ids: Tensor, randomize: Any) -> None:
    plain = tiny(family).state_dict()
    model = get_peft_model(tiny(family), CONFIGS[name])
    randomize(model)
    got = get_base_model_state_dict(model)
    assert set(got) == set(plain)
    assert all(torch.equal(got[key], plain[key]) for key in plain)

    adapted = model(ids).logits
    other = tiny(family, seed=3).state_dict()
    assert set_base_model_state_dict(model, other) == ([], [])
    assert not torch.allclose(model(ids).logits, adapted, atol=1e-3)
    set_base_model_state_dict(model, plain)
    assert torch.equal(model(ids).logits, adapted)


def test_pefts_gives_the_same_names(tiny: Any) -> None:
    theirs = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]))
    ours = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]), tiny())
    assert set(peft.get_base_model_state_dict(theirs)) == set(get_base_model_state_dict(ours))


def test_what_does_not_fit_changes_nothing(tiny: Any, ids: Tensor) -> None:
    model = get_peft_model(tiny(), CONFIGS["rows"])
    before = model(ids).logits
    values = tiny(seed=3).state_dict()
    values["extra"] = values.pop("lm_head.weight")
    values["model.norm.weight"] = torch.ones(7)
    with pytest.raises(FormatError, match=r"(?s)shape \(7,\).*norm.weight.*missing: lm_head.*unexpected: extra"):
        set_base_model_state_dict(model, values)
    assert torch.equal(model(ids).logits, before)
    del values["model.norm.weight"]
    told = set_base_model_state_dict(model, values, strict=False)
    assert told == (["model.norm.weight", "lm_head.weight"], ["extra"])

    model.merge_adapter()
    with pytest.raises(AdapterNameError, match=r"'default'.* merged: call unmerge_adapter"):
        get_base_model_state_dict(model)
