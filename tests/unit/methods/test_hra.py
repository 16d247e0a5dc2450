"""HRA against a chain of reflections and PEFT."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from methods_in_peft import assert_convolutions_equal_peft, assert_equals_peft, site
from veneer import HRAConfig, get_peft_model
from veneer.errors import ConfigError, TargetError
from veneer.quant.dense import DenseWeight
from veneer.records.linear import fold_linear
from veneer.records.sites import LinearSite

SETTINGS = {"r": 4}


@pytest.mark.parametrize("orthogonal", [False, True])
def test_the_weight_is_behind_a_chain_of_reflections(orthogonal):
    w, u = torch.randn(7, 5, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    config, place = HRAConfig(r=3, apply_GS=orthogonal), replace(site("q_proj", 7, 5), weight=DenseWeight(w))
    chain = torch.eye(5, dtype=torch.float64)
    vectors: list[torch.Tensor] = []
    for k in range(3):
        v = u[:, k] - sum(((u[:, k] @ before) * before for before in vectors), torch.zeros(5)) * orthogonal
        vectors.append(v / v.norm())
        chain = chain @ (torch.eye(5) - 2 * torch.outer(vectors[k], vectors[k]))
    torch.testing.assert_close(fold_linear(config.lower(place, {"hra_u": u}), w)[0], w @ chain)


def test_equal_pairs_start_as_the_base_and_an_odd_one_does_not():
    w = torch.randn(7, 5)
    place = replace(site("q_proj", 7, 5), weight=DenseWeight(w))
    for r, same in ((4, True), (3, False)):
        config = HRAConfig(r=r)
        folded, _ = fold_linear(config.lower(place, config.init(place)), w)
        assert torch.allclose(folded, w, atol=1e-6) == same


@pytest.mark.parametrize("fields", [{}, {"apply_GS": True}], ids=str)
def test_it_equals_peft(fields, tmp_path):
    assert_equals_peft(HRAConfig, "HRAConfig", tmp_path, r=3, init_weights=False, **fields)


def test_what_it_refuses():
    with pytest.raises(ConfigError, match="r=0 must be a whole number of at least 1"):
        HRAConfig(r=0)
    with pytest.raises(ConfigError, match="HRA at q_proj needs the frozen weight"):
        HRAConfig().lower(site("q_proj", 7, 5), {"hra_u": torch.ones(5, 8)})


def test_convolutions_equal_peft(tmp_path):
    assert_convolutions_equal_peft("HRAConfig", tmp_path, r=3, init_weights=False)


def test_convolutions_in_groups_are_refused():
    with pytest.raises(TargetError, match="0 is a convolution in 2 groups, which this method cannot change"):
        get_peft_model(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), HRAConfig(target_modules=["0"]))


@pytest.mark.parametrize("settings", [{}, {"apply_GS": True}], ids=["triangular", "orthonormal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_16_bits_are_lowered_in_float32(dtype: torch.dtype, settings: dict[str, bool]) -> None:
    config = HRAConfig(r=4, target_modules=["q"], init_weights=False, **settings)
    weight = DenseWeight(torch.randn(13, 11))
    site = LinearSite(name="q", in_features=11, out_features=13, weight=weight)
    params = {"hra_u": torch.randn(11, 4).to(dtype)}
    found, expected = config.lower(site, params), config.lower(site, {"hra_u": params["hra_u"].float()})
    assert found.low_rank.a.dtype == dtype
    torch.testing.assert_close(found.added(), expected.added(), rtol=0.05, atol=0.05)
