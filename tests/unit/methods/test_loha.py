"""LoHa against its paper's formula and PEFT."""

from __future__ import annotations

import pytest
import torch

from methods_in_peft import assert_equals_peft, site
from veneer import LoHaConfig
from veneer.core.linear import fold_linear
from veneer.errors import ConfigError

SETTINGS = {"r": 3, "alpha": 5.0}


def test_the_update_is_a_product_entry_by_entry():
    config = LoHaConfig(r=2, alpha=3.0, alpha_pattern={"q_proj": 7.0})
    place = site("model.q_proj", 7, 5)
    params = {name: torch.randn(shape, dtype=torch.float64) for name, shape in config.shapes(place).items()}
    w = torch.randn(7, 5, dtype=torch.float64)
    product = (params["hada_w1_a"] @ params["hada_w1_b"]) * (params["hada_w2_a"] @ params["hada_w2_b"])
    torch.testing.assert_close(fold_linear(config.lower(place, params), w)[0], w + 7 / 2 * product)


@pytest.mark.parametrize("fields", [{}, {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"v_proj": 3}}], ids=str)
def test_it_equals_peft(fields, tmp_path):
    assert_equals_peft(LoHaConfig, "LoHaConfig", tmp_path, r=3, alpha=5, init_weights=False, **fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 0}, "r=0 must be a whole number of at least 1"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj']=0 must be"),
        ({"alpha_pattern": {"(": 2.0}}, "'(' is not a regular expression"),
        ({"rank_dropout": 0.1}, "rank_dropout=0.1 drops parts of the update in training"),
        ({"module_dropout": 0.2}, "module_dropout=0.2 drops parts of the update in training"),
    ],
)
def test_what_it_refuses(fields, words):
    with pytest.raises(ConfigError) as caught:
        LoHaConfig(**fields)
    assert words in str(caught.value)


def test_dropouts_of_a_trained_adapter_are_read():
    assert LoHaConfig(rank_dropout=0.1, inference_mode=True).rank_dropout == 0.1
