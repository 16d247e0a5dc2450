"""OSF against its triplets in closed form and PEFT."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace

import peft
import pytest
import torch
from torch import nn

import veneer
from methods_in_peft import TARGETS, assert_equals_peft, base, every_base, site
from veneer import OSFConfig, get_peft_model
from veneer.errors import ConfigError, TargetError
from veneer.quant.dense import DenseWeight
from veneer.records.linear import fold_linear

SETTINGS = {"effective_rank": 0.7}
PEFT_ERROR = 1e-4  # its triplets are in float32
PROJECTS = "projected"  # the function of the method that changes gradients


def test_the_lesser_triplets_are_in_the_parameters():
    w = torch.randn(7, 5)
    place, config = replace(site("q_proj", 7, 5), weight=DenseWeight(w)), OSFConfig(effective_rank=3)
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    params = {"U_low": torch.randn(7, 2), "S_low": torch.randn(2), "V_low": torch.randn(2, 5)}
    record = config.lower(place, params)
    expected = u[:, :3] * s[:3] @ v[:3] + params["U_low"] @ torch.diag(params["S_low"]) @ params["V_low"]
    torch.testing.assert_close(fold_linear(record, w)[0], expected)
    start = OSFConfig(effective_rank=3, init_weights=None).init(place)  # None is True, as in PEFT
    torch.testing.assert_close(start["U_low"] * start["S_low"] @ start["V_low"], u[:, 3:] * s[3:] @ v[3:])
    x, dy = torch.randn(3, 5), torch.randn(3, 7)
    torch.testing.assert_close(record.changes[0].matmul(x), x @ record.added().T)
    torch.testing.assert_close(record.changes[0].matmul_t(dy), dy @ record.added())


@pytest.mark.parametrize("size", [(7, 5), (5, 7), (6, 6)], ids=str)
def test_gradients_are_orthogonal_to_what_stays(size):
    w = torch.randn(*size)
    place, config = replace(site("q_proj", *size), weight=DenseWeight(w)), OSFConfig()
    u, _, v = torch.linalg.svd(w, full_matrices=False)
    params = {name: torch.randn(x.shape, requires_grad=True) for name, x in config.init(place).items()}
    grads = torch.autograd.grad(config.lower(place, params).added().square().sum(), list(params.values()))
    kept = config.kept(place)
    assert all(gradient.norm() > 0.1 for gradient in grads)
    torch.testing.assert_close(u[:, :kept].T @ grads[0], torch.zeros(kept, len(params["S_low"])), rtol=0, atol=1e-4)
    torch.testing.assert_close(grads[2] @ v[:kept].T, torch.zeros(len(params["S_low"]), kept), rtol=0, atol=1e-4)


@every_base
@pytest.mark.parametrize("fields", [{}, {"effective_rank": 0.7, "rank_pattern": {"v_p|4h": 5}}], ids=str)
def test_it_equals_peft(fields, on, tmp_path):
    assert_equals_peft(OSFConfig, "OSFConfig", tmp_path, on, init_weights=False, **fields)


def test_targets_left_out_are_all_linear_layers_of_a_model_without_the_usual_names():
    net = nn.Sequential(OrderedDict(first=nn.Linear(5, 7), second=nn.Linear(7, 6)))
    found = [
        set(library.get_peft_model(copy.deepcopy(net), library.OSFConfig()).peft_config["default"].target_modules)
        for library in (veneer, peft)
    ]
    assert found == [{"first", "second"}] * 2
    assert "lm_head" not in get_peft_model(base(), OSFConfig()).peft_config["default"].target_modules


def test_what_it_refuses():
    with pytest.raises(ConfigError, match=r"effective_rank=0 must be .* share .*rank_pattern\['v'\]=-0.5 must be"):
        OSFConfig(effective_rank=0, rank_pattern={"v": -0.5})
    with pytest.raises(
        TargetError, match=r"effective_rank keeps 12 of the 12 singular .*v_proj: give a rank from 1 to 11"
    ):
        get_peft_model(base(), OSFConfig(effective_rank=12, target_modules=TARGETS))
    assert (
        "gate has one singular triplet, and OSF needs two: list it"
        in OSFConfig().checks.layers([site("gate", 1, 9)])[0]
    )
    with pytest.raises(TargetError, match="rank_pattern key 'nowhere' is found in none of the 6 modules"):
        get_peft_model(base(), OSFConfig(rank_pattern={"nowhere": 3}, target_modules=TARGETS))
    with pytest.raises(ConfigError, match="OSF at q_proj needs the frozen weight"):
        OSFConfig().derived(site("q_proj", 7, 5), {})
