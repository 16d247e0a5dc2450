"""PEANuT against its network in closed form and PEFT."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from methods_in_peft import assert_equals_peft, site
from veneer import PeanutConfig
from veneer.errors import ConfigError
from veneer.quant.dense import DenseWeight
from veneer.records.linear import fold_linear

SETTINGS = {"depth": 1, "act_fn": "silu", "scaling": 3.0}


def test_the_change_is_a_function_of_the_weight():
    w, a, b = (torch.randn(*size, dtype=torch.float64) for size in ((7, 5), (2, 7), (7, 2)))
    encode, decode = torch.randn(2, 2, 2, dtype=torch.float64)
    place = replace(site("q_proj", 7, 5), weight=DenseWeight(w))
    shallow = PeanutConfig(r=2, scaling=1.5, act_fn="tanh").lower(place, {"peanut_A": a, "peanut_B": b})
    torch.testing.assert_close(fold_linear(shallow, w)[0], w + 1.5 * b @ (a @ w).tanh())
    params = {"peanut_A": a, "peanut_encoders-0": encode, "peanut_decoders-0": decode, "peanut_B": b}
    deep = PeanutConfig(r=2, depth=1, act_fn="tanh").lower(place, params)
    first = (a @ w).tanh()
    expected = w + b @ ((decode @ (encode @ first).tanh()).tanh() + first)
    torch.testing.assert_close(fold_linear(deep, w)[0], expected)


@pytest.mark.parametrize("fields", [{}, {"depth": 2, "act_fn": "mish", "scaling": 3.0}], ids=str)
def test_it_equals_peft(fields, tmp_path):
    assert_equals_peft(PeanutConfig, "PeanutConfig", tmp_path, moved=True, r=3, init_weights=False, **fields)


def test_what_it_refuses():
    with pytest.raises(ConfigError, match=r"r=0 must be .*depth=-1 must be a whole number of at least 0"):
        PeanutConfig(r=0, depth=-1)
    with pytest.raises(ConfigError, match=r"act_fn='elu' must be 'relu', 'gelu', .* or 'tanh'"):
        PeanutConfig(act_fn="elu")
    with pytest.raises(ConfigError, match="PEANuT at q_proj needs the frozen weight"):
        PeanutConfig(r=2).lower(site("q_proj", 7, 5), {"peanut_A": torch.zeros(2, 7)})
