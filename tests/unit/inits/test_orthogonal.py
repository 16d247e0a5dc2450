"""The orthogonal start: PEFT's draws, and a product of zero."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from methods_in_peft import site
from veneer import LoraConfig
from veneer.errors import ConfigError
from veneer.inits import find_start


def test_it_draws_what_peft_draws_and_changes_nothing():
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights="orthogonal")
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(5, 7)), config).base_model.model[0]
    torch.manual_seed(3)
    theirs.orthogonal_init("default")
    torch.manual_seed(3)
    a, b = find_start("orthogonal").factors(site("0", 7, 5), 4, 1.0, None)
    torch.testing.assert_close(a, theirs.lora_A["default"].weight.data)
    torch.testing.assert_close(b, theirs.lora_B["default"].weight.data)
    torch.testing.assert_close(b @ a, torch.zeros(7, 5))


def test_an_odd_rank_is_refused():
    config = LoraConfig(r=3, init_lora_weights="orthogonal")
    with pytest.raises(ConfigError, match="the orthogonal start at q_proj halves the rank, and r=3 is odd"):
        config.init(site("q_proj", 7, 5))
